"""What lm-eval's results say, as figures: of a run in this process, or out of the files of its command line."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from llmq.errors import UserError
from llmq.types import Better, Measurement, Samples

SHARES = ("acc", "exact_match", "f1", "pass_at")
Answers = Sequence[Mapping[str, Any]]


def measurements(
    results: Mapping[str, Any], limit: float | None = None, cut: Mapping[str, int] | None = None
) -> Iterator[Measurement]:
    """A figure for each task, metric and filter of lm-eval's `results`, with the samples that stand under `samples`.

    `cut` counts for each task the questions that lost their beginning, as the model's window is shorter. Raises
    `UserError`, after all other figures, for one that is no finite number.
    """
    broken = []
    for task, figures in results["results"].items():
        asked = answers(results, task)
        protocol = convention(results, task, asked, limit, cut or {})
        for key, found in figures.items():
            metric, _, filtered = key.partition(",")
            value = number(found)
            if not filtered or metric.endswith("_stderr") or value is None:
                continue
            if math.isfinite(value):
                stderr = number(figures.get(f"{metric}_stderr,{filtered}"))
                yield _measurement(results, task, (metric, filtered), value, stderr, asked, protocol)
            else:
                broken.append(f"{task} {metric} ({filtered}) is {value}, no finite number")
    if broken:
        raise UserError(f"lm_eval: {'; '.join(broken)}")


def _measurement(
    results: Mapping[str, Any],
    task: str,
    key: tuple[str, str],
    value: float,
    stderr: float | None,
    asked: Answers,
    protocol: str,
) -> Measurement:
    metric, filtered = key
    rows = [s for s in asked if s.get("filter", "none") == filtered]
    scored = [s for s in rows if s.get(metric) is not None]
    having = {s["task"] for s in scored}  # tasks of a group without this metric have no part in its figure
    documents = len({identity(s) for s in rows if s["task"] in having})
    told = f", {documents - len(scored)} of {documents} questions left unscored" if len(scored) < documents else ""
    return Measurement(
        task,
        metric if filtered == "none" else f"{metric} ({filtered})",
        value,
        "share" if metric.startswith(SHARES) and 0 <= value <= 1 else "",
        direction(results, task, metric),
        len(scored) if scored else _counted(results, task),
        stderr if stderr is not None and math.isfinite(stderr) else None,
        protocol + (told if scored else ""),
        paired(scored, metric, value),
        guessing(scored, metric) if metric.startswith("acc") else None,
    )


def number(value: Any) -> float | None:
    """A number of Python or of numpy as a float, else None; True and False are 1 and 0."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    try:
        return float(value) if isinstance(value, Real) else None
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf


def _counted(results: Mapping[str, Any], task: str) -> int:
    """The number of questions that lm-eval says it scored, where no answers are kept."""
    if told := results.get("n-samples", {}).get(task, {}).get("effective"):
        return int(told)
    return sum(_counted(results, member) for member in members(results, task))


def members(results: Mapping[str, Any], task: str) -> list[str]:
    """The single tasks of a group, each once, whatever groups within it hold them; nothing for a task."""
    within: dict[str, None] = {}
    for member in results.get("group_subtasks", {}).get(task, ()):
        within |= dict.fromkeys(members(results, member) or [member])
    return list(within)


def answers(results: Mapping[str, Any], task: str) -> list[Mapping[str, Any]]:
    """The answers to a task's questions in their order, or to those of a group's tasks one after another.

    Each bears the name of its task.
    """
    kept = results.get("samples", {})
    return [
        {**answer, "task": name}
        for name in members(results, task) or [task]
        for answer in sorted(kept.get(name, ()), key=lambda s: int(s["doc_id"]))
    ]


def identity(answer: Mapping[str, Any]) -> str:
    """The document that an answer is about: its task, its place there, and the hash of its text."""
    return f"{answer['task']}:{answer['doc_id']}:{str(answer.get('doc_hash', ''))[:12]}"


def direction(results: Mapping[str, Any], task: str, metric: str) -> Better:
    """The task's word on whether more is better, or that of all tasks of a group, or of lm-eval's registry of metrics.

    "unknown" where nobody says so, or the tasks of a group disagree.
    """
    if within := members(results, task):
        having = [t for t in within if any(k.partition(",")[0] == metric for k in results["results"].get(t, {}))]
        said = {direction(results, t, metric) for t in having or within}
        return said.pop() if len(said) == 1 else "unknown"
    higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
    if not isinstance(higher, bool):
        higher = _registered(metric)
    return "unknown" if higher is None else "higher" if higher else "lower"


def _registered(metric: str) -> bool | None:
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import higher_is_better_registry

    return bool(higher_is_better_registry.get(metric)) if metric in higher_is_better_registry else None


def convention(
    results: Mapping[str, Any], task: str, asked: Answers, limit: float | None, cut: Mapping[str, int]
) -> str:
    """Version of the harness and of the task, the hash of the questions, and how they were asked."""
    shots = results.get("n-shot", {}).get(task, 0)
    first = f", first {limit:g} questions" if limit else ""
    lost = sum(cut.get(name, 0) for name in members(results, task) or [task])
    short = f", {lost} questions cut on the left to the model's window" if lost else ""
    return (
        f"lm-eval {results['lm_eval_version']}, task version {results['versions'].get(task)}, "
        f"hash {_what_was_asked(results, task, asked)}, {shots}-shot{first}{short}"
    )


def _what_was_asked(results: Mapping[str, Any], task: str, asked: Answers) -> str:
    """The hash of all that a model was asked; of files without samples, of how they say that it was asked."""
    if asked:
        return task_hash(asked)[:12]
    config = results.get("configs", {}).get(task, {})
    said = {name: config.get(name) for name in ("dataset_path", "dataset_name", "test_split", "generation_kwargs")}
    said |= {name: results.get(name) for name in ("chat_template_sha", "system_instruction_sha")}
    said["gen_kwargs"] = (results.get("config") or {}).get("gen_kwargs")
    return f"without samples {hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]}"


def paired(scored: Answers, metric: str, value: float) -> Samples | None:
    """The score of each question, where the figure is made of them by a mean, a perplexity or bits a byte.

    lm-eval's other aggregations cannot be resampled so: they keep their figure and standard error. Raises `UserError`
    for a document that is scored twice.
    """
    ids = tuple(identity(s) for s in scored)
    if twice := [one for one, other in zip(sorted(ids), sorted(ids)[1:], strict=False) if one == other]:
        raise UserError(f"lm_eval: document {twice[0]!r} is scored twice by {metric}")
    for samples in _readings([s[metric] for s in scored], ids):
        sums = math.fsum(samples.values), math.fsum(samples.weights or (1.0,) * len(ids))
        mean = sums[0] / sums[1] if sums[1] else math.nan
        wanted = math.log(value) if samples.statistic == "exp" and value > 0 else value
        if math.isclose(mean, wanted, rel_tol=1e-9, abs_tol=1e-9):
            return samples
    return None


def _readings(scores: Sequence[Any], ids: tuple[str, ...]) -> Iterator[Samples]:
    """What lm-eval's aggregations can make of scores: numbers, or pairs of a log-likelihood and its words or bytes."""
    plain = [number(s) for s in scores]
    if scores and None not in plain:
        values = [v for v in plain if v is not None]
        yield Samples(tuple(values), ids=ids)
        yield Samples(tuple(-v for v in values), None, "exp", ids=ids)  # `perplexity`
    pairs = [tuple(map(number, s)) if isinstance(s, tuple | list) and len(s) == 2 else (None,) for s in scores]
    if pairs and not any(None in pair for pair in pairs):
        lost = tuple(-float(pair[0] or 0) for pair in pairs)
        weights = tuple(float(pair[1] or 0) for pair in pairs)
        yield Samples(lost, weights, "exp", ids=ids)  # `weighted_perplexity`
        yield Samples(tuple(v / math.log(2) for v in lost), weights, ids=ids)  # `bits_per_byte`


def guessing(scored: Answers, metric: str) -> float | None:
    """The share of right answers that guessing makes, where each question has choices and some of them are right."""
    if not all(number(s.get(metric)) in (0, 1) for s in scored):
        return None
    choices = [_choices(s) for s in scored]
    if not choices or min(choices) < 2:
        return None
    return sum(_right(s) / c for s, c in zip(scored, choices, strict=True)) / len(choices)


def _choices(answer: Mapping[str, Any]) -> int:
    """How many choices a question offers; for mutual information each is asked a second time, without the question."""
    asked = len(answer["arguments"])
    return asked // 2 if "acc_mutual_info" in answer else asked


def _right(answer: Mapping[str, Any]) -> int:
    """How many choices are right: the target lists them, in a file as text."""
    target = answer.get("target")
    if isinstance(target, str) and re.fullmatch(r"\[\d+(, \d+)*\]", target):
        target = json.loads(target)
    return len(set(target)) if isinstance(target, list) and all(isinstance(t, int) for t in target) else 1


def task_hash(samples: Answers) -> str:
    """As the harness computes it when it writes its results: questions, prompts, targets; and how to generate."""
    asked = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    how = sorted({json.dumps(its, sort_keys=True, default=str) for s in samples for its in _settings(s["arguments"])})
    return hashlib.sha256((asked + "".join(how)).encode()).hexdigest()


def _settings(arguments: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of `generate` among a question's arguments, as they are in memory or in a file."""
    for each in arguments.values() if isinstance(arguments, dict) else arguments:
        yield from (its for its in (each.values() if isinstance(each, dict) else each) if isinstance(its, dict))
