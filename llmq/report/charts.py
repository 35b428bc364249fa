"""The pictures of a report, as SVG text."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmq.report import Report

INK, BASE, STAGES = "#1f2933", "#8795a1", ("#2f6fde", "#d9822b", "#0f9960", "#8f398f", "#c23030", "#00998c")
QUALITY = ("token_perplexity", "psnr", "map", "top1", "frechet_distance", "acc")
SIZE, SPEED = "bytes_on_disk", ("decode_tokens_per_second", "images_per_second")


def draw(report: Report) -> dict[str, str]:
    """Title -> SVG, for every picture that the report has the figures for."""
    with _plain_text():
        pictures = {"Size against quality": _trade_off(report), "Speed": _speed(report), "Training": _training(report)}
        return {title: svg for title, svg in pictures.items() if svg}


def _plain_text() -> Any:
    """No name is read as mathematics, between `$` and `$`."""
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False})


def _colours(report: Report) -> dict[str, str]:
    names = [s["name"] for s in report.stages]
    return {name: BASE if i == 0 else STAGES[(i - 1) % len(STAGES)] for i, name in enumerate(names)}


def _of(report: Report, metrics: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    for metric in metrics:
        found = [m for m in report.measurements if m["metric"] == metric]
        if found:
            return {m["stage"]: m for m in reversed(found)}, metric
    return {}, ""


def _trade_off(report: Report) -> str:
    sizes, _ = _of(report, [SIZE])
    quality, metric = _of(report, QUALITY)
    both = [s for s in sizes if s in quality]
    if len(both) < 2:
        return ""
    figure, axes = _figure(3.6)
    above = True
    for name, colour in _colours(report).items():
        if name in both:
            x, y = sizes[name]["value"] / 1e6, quality[name]["value"]
            axes.errorbar(x, y, yerr=quality[name]["stderr"], fmt="o", color=colour, markersize=7, capsize=3)
            place = (8, 5 if above else -12)  # in turn, or the names of stages alike would lie on one another
            axes.annotate(name, (x, y), xytext=place, textcoords="offset points", color=colour, fontsize=8.5)
            above = not above
    axes.set_xlim(0, 1.3 * max(sizes[s]["value"] for s in both) / 1e6)
    axes.margins(y=0.2)
    better = next(iter(quality.values()))["better"]
    axes.set_xlabel("MB on disk  (← smaller is better)")
    told = {"higher": "  (↑ higher is better)", "lower": "  (↓ lower is better)"}.get(better, "")
    axes.set_ylabel(f"{metric.replace('_', ' ')}{told}")
    return _svg(figure)


def _speed(report: Report) -> str:
    speeds, metric = _of(report, SPEED)
    if len(speeds) < 2:
        return ""
    figure, axes = _figure(max(3.6, 1.0 + 0.42 * len(speeds)))
    colours = _colours(report)
    names = [n for n in reversed(colours) if n in speeds]
    values = [speeds[n]["value"] for n in names]
    axes.barh(
        names,
        values,
        xerr=[speeds[n]["stderr"] or 0 for n in names],
        color=[colours[n] for n in names],
        height=0.6,
        error_kw={"ecolor": INK, "capsize": 3},
    )
    for i, value in enumerate(values):
        axes.text(0.01 * max(values), i, f"{value:.1f}", va="center", color="white", fontsize=9, fontweight="bold")
    axes.set_xlabel(f"{metric.replace('_per_second', '').replace('_', ' ')} a second  (→ more is better)")
    return _svg(figure)


def _training(report: Report) -> str:
    trained = [s for s in report.stages if s["notes"].get("training", {}).get("loss")]
    if not trained:
        return ""
    figure, axes = _figure(3.6)
    colours = _colours(report)
    metrics = list(dict.fromkeys(filter(None, (s["notes"]["training"].get("metric") for s in trained))))
    beside = axes.twinx() if metrics else None
    for stage in trained:
        curves, style = stage["notes"]["training"], {"color": colours[stage["name"]]}
        axes.plot(*zip(*curves["loss"], strict=True), **style, alpha=0.45, lw=1.2, label=f"{stage['name']}, training")
        if curves.get("held_out_loss"):
            held_out = zip(*curves["held_out_loss"], strict=True)
            axes.plot(*held_out, "o-", **style, lw=2, label=f"{stage['name']}, held-out")
        if beside and curves.get("held_out"):
            label = f"{stage['name']}, held-out {curves['metric']}"
            beside.plot(*zip(*curves["held_out"], strict=True), "o-", **style, lw=2)
            axes.plot([], [], "o-", **style, lw=2, label=label)  # one legend for both scales
    axes.set_xlabel("step")
    units = dict.fromkeys(s["notes"]["training"].get("loss_unit", "nats a token") for s in trained)
    axes.set_ylabel(f"loss, {', '.join(units)}")
    if beside:
        beside.spines["top"].set_visible(False)
        beside.set_ylabel(f"held-out {', '.join(metrics)}")
    # Curves on two scales cross in the middle of the picture; there only the right of it is free.
    axes.legend(frameon=False, fontsize=8.5, loc="center right" if beside else "best")
    return _svg(figure)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmq"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    # Text stays text, in the font of the page; the XML head and the metadata have no place inside HTML.
    return re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
