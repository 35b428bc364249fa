"""Results side by side: differences with intervals, and a refusal where two figures do not measure the same thing."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmq.errors import UserError
from llmq.judge import protocols, results
from llmq.judge.results import Key, Result
from llmq.statistics import compare, power
from llmq.statistics.compare import Comparison
from llmq.statistics.estimates import FEWEST, unpaired
from llmq.types import JsonObject, Measurement


@dataclass(frozen=True)
class Refusal:
    """A figure of two results that is not compared, and the reason."""

    result: str
    task: str
    metric: str
    reason: str


@dataclass(frozen=True)
class Comparisons:
    """Results beside the first of them. The verdicts are corrected for all comparisons of the table (Holm)."""

    results: Sequence[Result]
    comparisons: Sequence[tuple[str, Comparison]]
    refusals: Sequence[Refusal]

    def plain(self) -> JsonObject:
        """The table as JSON holds it."""
        first = self.results[0].name
        return {
            "against": first,
            "results": [r.name for r in self.results],
            "stored": {r.name: r.stored for r in self.results if r.stored},
            "measurements": [
                {"result": r.name, **{k: v for k, v in asdict(m).items() if k != "samples"}}
                for r in self.results
                for m in r.measurements
            ],
            "comparisons": [{"result": name, "against": first, **asdict(c)} for name, c in self.comparisons],
            "refused": [asdict(r) for r in self.refusals],
        }


def targets(names: Sequence[str]) -> list[Result]:
    """The results to compare: the stages of a single run; of several runs the last stage of each.

    Raises `UserError` for a missing target, or fewer than two results.
    """
    if not names:
        raise UserError("nothing to compare; name a run, or two results")
    read = {name: results.read(name) for name in names}
    if len(names) == 1:
        found = read[names[0]]
        if len(found) < 2:
            raise UserError(f"{names[0]!r} is one result; name another to compare it with")
        return found
    last = [(name, found[-1], len(found) > 1) for name, found in read.items()]
    meant: dict[tuple[Path, str], str] = {}
    for name, result, _ in last:
        if (twin := meant.setdefault((result.run, result.name), name)) != name:
            raise UserError(f"{twin!r} and {name!r} are one result; name another to compare it with")
    labels = [_label(name, result, whole) for name, result, whole in last]
    # The same run twice, or two of one name, would be one column.
    unique = labels if len(set(labels)) == len(labels) else [name for name, _, _ in last]
    if len(unique) < 2:
        raise UserError(f"{names[0]!r} is named twice; name another to compare it with")
    return [replace(result, name=label) for label, (_, result, _) in zip(unique, last, strict=True)]


def _label(name: str, result: Result, whole: bool) -> str:
    """The run and the stage; of the only stage its name, or that of the model that `llmq eval` measured."""
    if whole:
        return f"{Path(name).resolve().name}/{result.name}"
    return Path(result.target).name or result.name


def side_by_side(found: Sequence[Result], seed: int = 0) -> Comparisons:
    """Every result beside the first. Raises `UserError` with the reasons where nothing at all can be compared."""
    first, *others = found
    compared: list[tuple[str, Comparison]] = []
    refusals: list[Refusal] = []
    for other in others:
        for key, measurement in other.figures.items():
            if key not in first.figures:
                continue
            reason = unlike(first, other, key)
            if reason:
                refusals.append(Refusal(other.name, *key, reason))
            else:
                compared.append((other.name, _comparison(measurement, first.figures[key], seed)))
    if not compared:
        why = "; ".join(dict.fromkeys(f"{r.task} {r.metric}: {r.reason}" for r in refusals))
        raise UserError(f"{others[0].name!r} cannot be compared with {first.name!r}: {why or _nothing_shared(found)}")
    refusals += [refusal for other in others for refusal in _of_one(first, other)]
    verdicts = compare.corrected([c for _, c in compared])
    return Comparisons(found, [(name, c) for (name, _), c in zip(compared, verdicts, strict=True)], refusals)


def _of_one(first: Result, other: Result) -> Iterator[Refusal]:
    """The figures that only one of two results has."""
    for has, lacks in ((first, other), (other, first)):
        yield from (
            Refusal(other.name, *key, f"only {has.name} has it") for key in has.figures if key not in lacks.figures
        )


def _nothing_shared(found: Sequence[Result]) -> str:
    tasks = [", ".join(dict.fromkeys(m.task for m in r.measurements)) or "nothing" for r in found[:2]]
    return f"they share no figure ({tasks[1]} against {tasks[0]})"


def unlike(first: Result, other: Result, key: Key) -> str:
    """The reason not to compare the two figures of a task and metric, or nothing."""
    if first.run != other.run and (key in first.timed or key in other.timed):
        return "timed in different runs, so not in turn; compare the ratios to the base of each run"
    return protocols.refused(other.figures[key], first.figures[key])


def _comparison(m: Measurement, base: Measurement, seed: int) -> Comparison:
    found = compare.compare(m, base, seed)
    loose = None if found.ci95 or (m.samples and base.samples) else unpaired(m, base)
    if not loose:
        return found
    few = loose.n < FEWEST
    return replace(
        found,
        ci95=loose.interval,
        verdict=compare.verdict(None if few else loose.interval, m.better),
        p=None if few else loose.p,
        detectable=power.detectable(loose.stderr),
        needed=FEWEST if few else loose.needed(0.0),
        n=loose.n,
        reason=compare.too_few(loose.n) if few else "",
    )
