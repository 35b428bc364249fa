"""The layers of a stage as maps, a column a block: bits, error, the shares of zeros and of channels taken out."""

import re
from collections.abc import Iterator, Mapping
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.files import LAYERS
from llmq.guarded.files import library, read_json_object
from llmq.report.drawing import STAGES, as_svg, blank, plain_text
from llmq.runs.paths import within

if TYPE_CHECKING:
    from llmq.report import Report

Facts = Mapping[str, Mapping[str, Any]]
BLOCK = re.compile(r"\.(\d+)\.")
MOST = 24
"""Kinds of layers in a map: the first ones of a network whose layers all have names of their own."""


def draw(report: "Report", folder: Path) -> dict[str, str]:
    """Title -> SVG, for every stage whose step left facts about layers."""
    found = {}
    pruned = False
    with plain_text():
        for stage in report.stages:
            step = str(stage["step"] or "")
            pruned = pruned or (step.startswith("prune.") and step not in ("prune.channels", "prune.layers"))
            file = within(folder, f"{stage['folder']}/{LAYERS}", "report.json")
            if file.is_file():
                with library(file, "file of facts about layers"):
                    for title, svg in _maps(read_json_object(file), pruned):
                        found[f"{stage['name']}: {title}"] = svg
    return found


def _maps(facts: Facts, pruned: bool) -> Iterator[tuple[str, str]]:
    bits = {layer["bits"] for layer in facts.values()}
    same = f", {next(iter(bits))} bits each" if len(bits) == 1 and None not in bits else ""
    of = " and ".join(sorted({str(layer["error_of"]) for layer in facts.values() if "error_of" in layer}))
    for key, title in (
        (
            "error",
            f"error of {len(facts):,} layers{same} beside the stage before, by the norm of their {of}; {_worst(facts)}",
        ),
        *((("bits", "bits of a weight"),) if len(bits) > 1 else ()),
        *((("zeros", "share of weights that are zero"),) if pruned else ()),
        ("removed", "share of the output channels of each layer that were taken out"),
    ):
        values = {name: float(layer[key]) for name, layer in facts.items() if layer.get(key) is not None}
        if values:
            yield title, _map(values)


def _worst(facts: Facts) -> str:
    """The layer with the largest error."""
    errors = {name: float(layer["error"]) for name, layer in facts.items() if "error" in layer}
    if not errors:
        return ""
    name = max(errors, key=errors.__getitem__)
    return f"the largest is {errors[name]:.2g}, {name}"


def place_of(layer: str) -> tuple[str, int]:
    """The kind of a layer and the number of its block; experts of one block are of one kind."""
    block = BLOCK.search(layer)
    kind = BLOCK.sub(".", layer)
    return kind.removeprefix("model.").removeprefix("layers."), int(block[1]) if block else 0


def _map(values: Mapping[str, float]) -> str:
    """A row a kind of layer, a column a block; a cell is the mean of all layers that belong there."""
    import numpy as np

    cells: dict[tuple[str, int], list[float]] = {}
    for layer, value in values.items():
        cells.setdefault(place_of(layer), []).append(value)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))[:MOST]
    grid = np.full((len(kinds), 1 + max(block for _, block in cells)), nan)  # (kinds, blocks)
    for (kind, block), found in cells.items():
        if kind in kinds:
            grid[kinds.index(kind), block] = sum(found) / len(found)
    if grid.shape[1] == 1:
        return _bars(kinds, grid[:, 0].tolist())
    figure, axes = blank(1.1 + 0.2 * len(kinds))
    drawn = axes.pcolormesh(grid, cmap="viridis", edgecolors="none")
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("block")
    figure.colorbar(drawn, ax=axes, pad=0.01).ax.tick_params(labelsize=7.5)
    return as_svg(figure)


def _bars(kinds: list[str], values: list[float]) -> str:
    """A bar a layer, of a network without numbered blocks."""
    figure, axes = blank(0.8 + 0.2 * len(kinds))
    axes.barh(kinds, values, color=STAGES[0])
    axes.tick_params(labelsize=7.5)
    axes.invert_yaxis()
    return as_svg(figure)
