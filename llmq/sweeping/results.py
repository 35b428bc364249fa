"""What a sweep tells: the objectives of its runs, the front, the best, a page and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmq.errors import UserError
from llmq.files import write_json, write_text
from llmq.sweeping.points import Point, Swept
from llmq.sweeping.spec import Sweep
from llmq.terminal import say
from llmq.types import Measurement

FILE, PAGE, KNEE = "sweep.json", "compare.html", "knee.svg"


def judge(asked: Sweep, point: Point) -> None:
    """Note the objectives of a run that ended, and the verdict on the rules of the sweep.

    Raises `UserError` for an objective that its last stage does not have.
    """
    from llmq.judge import gate, results

    first, *_, last = 2 * [*results.run(point.folder).values()]  # a stage alone is both
    found = [gate.named(name, last.measurements, f"objective {name!r}") for name in asked.objectives]
    point.figures = {name: m.value for name, m in zip(asked.objectives, found, strict=True)}
    point.measured = found
    same = {(m.task, m.metric): name for name, m in zip(asked.objectives, found, strict=True)}
    point.base = {same[key]: m.value for m in first.measurements if (key := (m.task, m.metric)) in same}
    known = {name: _interval(m) for name, m in zip(asked.objectives, found, strict=True)}
    point.intervals = {name: interval for name, interval in known.items() if interval}
    point.losses = [m.value if m.better == "lower" else -m.value for m in found]
    point.gate = gate.overall(gate.of_run(str(point.folder), asked.gate)) if asked.gate else ""


def _interval(m: Measurement) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None for one that was counted, or whose scatter is unknown."""
    from llmq.statistics.estimates import alone, by_stderr

    found = None if m.exact else alone(m.samples) if m.samples else by_stderr(m)
    return found.interval if found else None


def front(rows: Mapping[str, Sequence[float]]) -> list[str]:
    """The names whose figures, all better when lower, no other row beats in one and equals or beats in the rest."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    return [name for name, mine in rows.items() if not any(beats(other, mine) for other in rows.values())]


def write(asked: Sweep, out: Path, points: Sequence[Point]) -> Swept:
    """Write the table of the runs so far, and their comparison as a page; figures of unlike protocols have no rank."""
    from llmq.judge import protocols

    done = [point for point in points if point.done]
    for point in done:
        point.unlike = next(filter(None, map(protocols.unlike, point.measured, done[0].measured)), "")
    rows = {point.name: point.losses for point in done if not point.unlike}
    passing = [p.name for p in done if p.gate in ("", "pass") and not p.unlike]
    best = min(passing, key=lambda name: tuple(rows[name]), default=None)
    swept = Swept(out, list(points), front(rows), best)
    write_json(out / FILE, {"sweep": asked.model_dump(mode="json"), **swept.plain()})
    if len(done) > 1:
        _draw(done, out)
        _draw_knee(asked, done, out)
    return swept


def _draw_knee(asked: Sweep, done: Sequence[Point], out: Path) -> None:
    """Draw each objective over the setting of a grid that has one setting, of numbers."""
    from llmq.report import knee

    setting, values = next(iter(asked.grid.items()), ("", []))
    if len(asked.grid) != 1 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return
    name = asked.name or done[0].recipe.name
    bases = [point.base for point in done if not point.unlike]
    same = {each: base for each, base in bases[0].items() if all(other.get(each) == base for other in bases)}

    units = {each: m.unit for each, m in zip(asked.objectives, done[0].measured, strict=False)}

    def curve(objective: str) -> knee.Curve:
        return {
            value: (p.figures[objective], p.intervals.get(objective))
            for p in done
            if objective in p.figures and not p.unlike and isinstance(value := p.settings[setting], int | float)
        }

    panels = [
        knee.Panel(f"{name}: {each}", setting, curve(each), same.get(each), units.get(each, ""))
        for each in asked.objectives
    ]
    write_text(out / KNEE, knee.draw(panels))


def _draw(done: Sequence[Point], out: Path) -> None:
    from llmq.judge import comparisons
    from llmq.report.html import draw_comparison

    try:
        found = comparisons.side_by_side(comparisons.targets([str(point.folder) for point in done]))
    except UserError as error:  # runs that share no figure have no page
        say(f"no page: {error}")
        return
    write_text(out / PAGE, draw_comparison(found))
