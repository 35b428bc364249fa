"""The scores of single samples, as a run keeps them: the questions whose answer flipped, with examples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.guarded.files import library, parse_json, read_json_object, read_text
from llmq.judge.protocols import refused
from llmq.runs.paths import within
from llmq.statistics.pairing import pairs
from llmq.types import JsonObject, Measurement

if TYPE_CHECKING:
    from llmq.report import Report

EXAMPLES, LONGEST = 3, 600
"""Examples of each direction that are shown, and the letters of each."""
RIGHT = frozenset({0.0, 1.0})
SHOWN = ("acc", "exact_match")
"""The metrics whose flips are shown with examples; `acc_norm` counts the same questions again."""
Key = tuple[str, str]
Scored = Mapping[str, Mapping[Key, Measurement]]
"""The figures with samples of each stage."""
Answers = Mapping[str, JsonObject]
"""The lines that lm-eval wrote about a task, by document."""


@dataclass(frozen=True)
class Flip:
    """One question that base and stage answer differently, one of them rightly."""

    question: str
    base: str
    stage: str
    lost: bool
    """True where the base is right."""


@dataclass(frozen=True)
class Flips:
    """The questions of a task by who answers them rightly, and examples of those that flipped."""

    stage: str
    task: str
    metric: str
    both: int
    lost: int
    """Right by the base, wrong by the stage."""
    gained: int
    neither: int
    examples: tuple[Flip, ...] = ()


def scored(report: "Report", folder: Path) -> Scored:
    """The figures with samples of each measured stage, by task and metric; those of clocks are left out.

    Empty where the run's own files are no longer in `folder`.
    """
    found: dict[str, dict[Key, Measurement]] = {}
    for name in report.measured:
        file = within(folder, f"{name}/measurements.json", "report.json")
        if file.is_file():
            with library(file, "file of answers"):
                kept = [Measurement.of(m) for m in read_json_object(file)["measurements"]]
            found[name] = {(m.task, m.metric): m for m in kept if m.samples}
    for c in report.comparisons:  # bicubic's figures, under names of their own
        key = c["task"], c["metric"]
        theirs, own = (found.get(c["against"], {}).get((key[0], n)) for n in (f"{c['stage']}_{key[1]}", key[1]))
        if c["stage"] not in report.measured and theirs and own:
            found.setdefault(c["stage"], {})[key] = replace(theirs, metric=key[1], convention=own.convention)
    return found


def flips(report: "Report", folder: Path, known: Scored) -> Iterator[Flips]:
    """The flips of every figure whose samples are right or wrong, stage by stage beside the first."""
    stages = [name for name in report.measured if name in known]
    with library(folder, "run"):
        yield from _all_flips(folder, stages, known)


def _all_flips(folder: Path, stages: Sequence[str], known: Scored) -> Iterator[Flips]:
    for (task, metric), base in known[stages[0]].items() if stages else ():
        for stage in stages[1:]:
            ours = known[stage].get((task, metric))
            if ours and _right_or_wrong(ours) and _right_or_wrong(base) and not refused(ours, base):
                yield _flips(folder, stages[0], stage, ours, base)


def _right_or_wrong(m: Measurement) -> bool:
    return bool(m.samples and m.samples.weights is None and set(m.samples.values) <= RIGHT)


def _flips(folder: Path, base_name: str, stage: str, ours: Measurement, base: Measurement) -> Flips:
    assert ours.samples
    assert base.samples
    paired = pairs(ours.samples, base.samples)
    counts = {(b, s): 0 for b in RIGHT for s in RIGHT}
    for pair in zip(paired.base.values, paired.stage.values, strict=True):
        counts[pair] += 1
    told = tuple(_examples(folder, base_name, stage, ours)) if ours.metric.partition(" ")[0] in SHOWN else ()
    both, lost, gained, neither = (counts[pair] for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    return Flips(stage, ours.task, ours.metric, both, lost, gained, neither, told)


def _examples(folder: Path, base: str, stage: str, of: Measurement) -> Iterator[Flip]:
    """The first questions that flipped in each direction, as lm-eval wrote them down."""
    metric, _, filtered = of.metric.partition(" (")
    theirs, ours = (_answers(folder, name, of.task, filtered.rstrip(")") or "none") for name in (base, stage))
    left = {True: EXAMPLES, False: EXAMPLES}
    for document, answer in theirs.items():
        other = ours.get(document, answer)
        lost = _score(answer, metric) > _score(other, metric)
        if left[lost] and _score(answer, metric) != _score(other, metric):
            left[lost] -= 1
            yield Flip(_question(answer), _said(answer), _said(other), lost)


def _answers(folder: Path, stage: str, task: str, filtered: str) -> Answers:
    files = sorted((folder / stage / "lm_eval").glob(f"samples_{task}_*.jsonl"))
    if not files:
        return {}
    file = within(folder, f"{stage}/lm_eval/{files[-1].name}", folder)
    lines = (parse_json(line, str(file)) for line in read_text(file).split("\n") if line.strip())
    return {str(line["doc_id"]): line for line in lines if line.get("filter", "none") == filtered}


def _score(answer: JsonObject, metric: str) -> float:
    return float(answer.get(metric, 0.0))


def _arguments(answer: JsonObject) -> list[list[object]]:
    """The text before each answer that was scored, and the answer itself."""
    return [list(each.values()) for each in answer["arguments"].values()]


def _question(answer: JsonObject) -> str:
    text = str(_arguments(answer)[0][0])
    return text if len(text) <= LONGEST else f"… {text[-LONGEST:]}"


def _said(answer: JsonObject) -> str:
    """The likeliest of the choices, or what was written."""
    replies, asked = answer["filtered_resps"], _arguments(answer)
    if len(asked) < 2:
        return str(replies[0])[:LONGEST]
    best = max(range(len(asked)), key=lambda i: float(replies[i][0]))
    return str(asked[best][1]).strip()[:LONGEST]
