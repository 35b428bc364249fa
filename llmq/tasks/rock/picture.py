"""The picture of one slice: where bicubic and the network err, and how two points of pores are correlated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.vision.upscaled import Upscaled


def picture(scene: Upscaled, pores: Mapping[str, ndarray], distance: int) -> bytes:
    """The true slice, where bicubic and model err (blue: a pore that is none; orange: missed), and the correlations."""
    import numpy as np

    from llmq.vision.pictures import panels, png, show, show_axes
    from llmq.vision.pores import two_point
    from llmq.vision.scale_bar import label, stamped

    figure, axes = panels(1, 4, 2.2, 2.3)
    bar = f", bar {label(scene.truth.shape[1], scene.pixel_size)}" if scene.pixel_size else ""
    show(axes[0, 0], stamped(scene.truth, scene.pixel_size), f"truth{bar}")
    for panel, kind in zip(axes[0, 1:3], ("bicubic", "model"), strict=True):
        drawn = np.where(pores["truth"][..., None], np.uint8(70), np.uint8(225)).repeat(3, 2)  # (height, width, 3)
        drawn[pores[kind] & ~pores["truth"]] = (47, 111, 222)
        drawn[~pores[kind] & pores["truth"]] = (217, 130, 43)
        wrong = (pores[kind] != pores["truth"]).mean()
        show(panel, drawn, f"{kind}: {100 * wrong:.1f} % wrong")
    curves = axes[0, 3]
    for kind, style in zip(("truth", "bicubic", "model"), ("k-", "C1--", "C0-"), strict=True):
        curves.plot(range(1, distance + 1), two_point(pores[kind], distance), style, lw=1.3, label=kind)
    show_axes(curves, "two-point correlation")
    return png(figure)
