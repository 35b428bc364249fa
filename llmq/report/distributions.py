"""The scores of single samples as pictures: by stage, and each stage less the base."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmq.judge.protocols import refused
from llmq.report.drawing import INK, as_svg, blank, colours_of, legend, plain_text
from llmq.statistics.estimates import FEWEST
from llmq.statistics.pairing import pairs
from llmq.types import Measurement, Samples

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.report import Report
    from llmq.report.samples import Key, Scored

MOST, BINS = 6, 24
"""Pictures of a page, and bars of each."""


def draw(report: "Report", known: "Scored", folded: Collection[str] = ()) -> dict[str, str]:
    """Title -> SVG: for each figure that is not `folded` its samples, at most `MOST`; porosity beside the true one."""
    stages = {name: known[name] for name in report.columns if name in known}
    colours = {**dict.fromkeys(stages, INK), **colours_of(report)}  # bicubic is no stage
    keys = list(
        dict.fromkeys(
            key for figures in stages.values() for key, m in figures.items() if _tells(m) and m.metric not in folded
        )
    )
    with plain_text():
        found = {
            f"{metric}, each sample of {task}": _samples(stages, colours, (task, metric))
            for task, metric in keys[:MOST]
        }
        rock = {"Porosity of each slice beside the true one": _porosity(stages, colours)}
    return {title: svg for title, svg in (found | rock).items() if svg}


def _tells(m: Measurement) -> bool:
    s = m.samples
    return bool(
        s and s.statistic != "quantile" and m.better != "unknown"
        and len(s.values) >= FEWEST and not set(s.values) <= {0.0, 1.0} and len(set(s.values)) > 1
    )  # fmt: skip


def values(samples: Samples) -> "ndarray":
    """The score of each sample as the figure counts it: a perplexity where the figure is one. `(samples,)`"""
    import numpy as np

    scores, weights = np.asarray(samples.values), np.asarray(samples.weights or 1.0)
    means: ndarray = np.divide(scores, weights, out=np.zeros_like(scores), where=weights != 0)
    if samples.statistic == "exp":
        means = np.exp(means)
    return means


def _samples(stages: "Scored", colours: Mapping[str, str], key: "Key") -> str:
    """Left the samples of every stage, right the differences of pairs from the first stage, where it has samples."""
    import numpy as np

    having = {name: figures[key] for name, figures in stages.items() if key in figures and figures[key].samples}
    (first, base), *others = having.items()
    differences = {n: _differences(m, base) for n, m in others if not refused(m, base) and first == next(iter(stages))}
    figure, axes = blank(3.2, columns=2 if differences else 1)
    panels = np.atleast_1d(axes)
    scores = {name: values(m.samples) for name, m in having.items() if m.samples}
    _histogram(
        panels[0],
        scores,
        colours,
        first if others else "",
        base.samples is not None and base.samples.statistic == "exp",
    )
    named = f"{key[1].replace('_', ' ')} of a sample"
    panels[0].set_xlabel(",\n".join(filter(None, (named, base.unit))))
    panels[0].set_ylabel(f"samples (n = {base.n:,})")
    if differences:
        _histogram(panels[1], differences, colours)
        panels[1].axvline(0, color=INK, lw=1, ls=":")
        panels[1].set_xlabel(f"less {first},\nin pairs")
    if len(having) > 1:
        legend(figure, panels[0])
    return as_svg(figure)


def _differences(m: Measurement, base: Measurement) -> "ndarray":
    assert m.samples
    assert base.samples
    both = pairs(m.samples, base.samples)
    difference: ndarray = values(both.stage) - values(both.base)
    return difference


def _histogram(
    panel: Any, scores: Mapping[str, "ndarray"], colours: Mapping[str, str], filled: str = "", log: bool = False
) -> None:
    """Every stage on the same bars, as outlines over the fill of one."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    low, high = float(min(map(np.min, scores.values()))), float(max(map(np.max, scores.values())))
    bars = int(np.clip(1.5 * max(map(len, scores.values())) ** 0.5, FEWEST, BINS))
    log = bool(log and low > 0 and high > 3 * low)
    edges = np.geomspace(low, high, bars + 1) if log else np.linspace(low, high, bars + 1)
    for name, of_stage in scores.items():
        kind = {"histtype": "stepfilled", "alpha": 0.35} if name == filled else {"histtype": "step", "lw": 1.6}
        panel.hist(of_stage, edges, color=colours[name], label=name, **kind)
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.xaxis.set_major_locator(MaxNLocator(4))
    if log:  # matplotlib writes powers of ten as formulas, which are text here
        ticks = [float(f"{tick:.2g}") for tick in np.geomspace(low, high, 5)[:-1]]
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)


def _porosity(stages: "Scored", colours: Mapping[str, str]) -> str:
    """The porosity of each slice by stage, and by bicubic, against that of the true slice."""
    shares: dict[str, Sequence[float]] = {}
    for name, figures in stages.items():
        for said, metric in ((name, "porosity"), ("truth", "true_porosity")):
            if (m := figures.get(("rock", metric))) and m.samples:
                shares.setdefault(said, [100 * v for v in m.samples.values])
    truth = shares.pop("truth", ())
    if not truth or any(len(of_stage) != len(truth) for of_stage in shares.values()):
        return ""
    figure, axes = blank(3.6)
    ends = [min(truth), max(truth)]
    axes.plot(ends, ends, "--", color=INK, lw=1, alpha=0.7, label="the truth")
    for name, of_stage in shares.items():
        axes.plot(truth, of_stage, "o", color=colours[name], ms=5, alpha=0.8, label=name)
    axes.set_xlabel("porosity of the true slice, %")
    axes.set_ylabel("porosity after Otsu, %")
    legend(figure, axes)
    return as_svg(figure)
