"""The picture of a search: size against the foretold divergence with the chosen point, and a bar a layer."""

from collections.abc import Mapping, Sequence

from llmq.report.drawing import BASE, INK, STAGES, as_svg, plain_text

COLOURS = (*STAGES, BASE)
"""The colours of the kinds of layers in a block."""


def draw(
    front: Sequence[tuple[int, float]],
    foretold: tuple[int, float],
    measured: tuple[float, float],
    bits: Mapping[str, float | None],
) -> str:
    """The picture as SVG. Points are (bytes, nats a token); `bits` are by layer, None for float weights."""
    import matplotlib
    from matplotlib.figure import Figure

    with plain_text(), matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.0, 5.6), layout="constrained")
        above, below = figure.subplots(2, 1)
        sizes, nats = zip(*front, strict=True)
        above.plot([size / 1e6 for size in sizes], nats, "o--", color=BASE, markersize=3, lw=1, label="foretold")
        for point, name, colour in ((foretold, "chosen", STAGES[0]), (measured, "measured", STAGES[1])):
            above.plot(point[0] / 1e6, point[1], "o", color=colour, markersize=8, label=name)
        above.set_yscale("log")
        above.yaxis.set_major_formatter("{x:g}")  # powers would be formulas, which are off
        above.set_xlabel("MB on disk  (← smaller is better)")
        above.set_ylabel("KL to the base, nats a token\n(↓ lower is better)")
        above.legend(frameon=False, fontsize=8.5)
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in bits))
        for i, (name, number) in enumerate(bits.items()):
            colour = COLOURS[kinds.index(name.rpartition(".")[2]) % len(COLOURS)]
            below.bar(i, number or 0, width=1.0, color=colour if number else INK)
        for i, kind in enumerate(kinds):
            below.bar(0, 0, color=COLOURS[i % len(COLOURS)], label=kind)
        below.set_xlabel("layer, in the order of the model  (none: float weights)")
        below.set_ylabel("bits of a weight")
        below.legend(frameon=False, fontsize=7.5, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return as_svg(figure)
