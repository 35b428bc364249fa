"""lm-eval's results as measurements: those of this process, or of files that lm-eval's command line wrote."""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.statistics.figures import ratio_stderr, repeats
from llmq.statistics.pairing import count
from llmq.types import Attachment, Better, Measurement, Samples

SHARES = ("acc", "exact_match", "f1", "pass_at")
PROMPTS = (
    "dataset_path", "dataset_name", "dataset_kwargs", "test_split", "validation_split", "fewshot_split",
    "fewshot_config", "process_docs", "description", "doc_to_text", "doc_to_choice", "doc_to_target", "repeats",
    "target_delimiter", "fewshot_delimiter", "gen_prefix", "output_type", "generation_kwargs", "filter_list",
)  # fmt: skip
"""The settings of a task that decide its questions, and how an answer is read."""
Results = dict[str, Any]
"""The results of `lm_eval.simple_evaluate`, as in `results_*.json`; the answers stand under `samples`."""
Answer = Mapping[str, Any]
"""A sample of lm-eval's: a question, the answer of the model, and the score by each metric."""
Answers = Sequence[Answer]
Arguments = Mapping[str, Mapping[str, object]] | Sequence[Sequence[object]]
"""The arguments of a question: by name in a file, in their order in memory."""


def measurements(
    results: Results, limit: float | None = None, cut: Mapping[str, int] | None = None
) -> Iterator[Measurement]:
    """A figure for each task, metric and filter, with the scores of the questions.

    `cut` counts for each task the questions that lost their beginning, as the model's window is shorter. Raises
    `UserError`, after all other figures, for one that is no finite number.
    """
    broken = []
    for task, figures in results["results"].items():
        asked = answers(results, task)
        protocol = _convention(results, task, asked, limit, cut or {})
        for key, said in figures.items():
            metric, _, filtered = key.partition(",")
            value = _number(said)
            if not filtered or metric.endswith("_stderr") or value is None:
                continue
            if math.isfinite(value):
                yield _measurement(results, task, key, value, asked, protocol)
            else:
                broken.append(f"{task} {metric} ({filtered}) is {value}, no finite number")
    if broken:
        raise UserError(f"lm_eval: {'; '.join(broken)}")


def _measurement(results: Results, task: str, key: str, value: float, asked: Answers, protocol: str) -> Measurement:
    metric, _, filtered = key.partition(",")
    stderr = _number(results["results"][task].get(f"{metric}_stderr,{filtered}"))
    rows = [s for s in asked if s.get("filter", "none") == filtered]
    scored = [s for s in rows if s.get(metric) is not None]
    having = {s["task"] for s in scored}  # tasks without this metric have no part in a group's figure
    documents = len({identity(s) for s in rows if s["task"] in having})
    if 0 < len(scored) < documents:
        protocol += f", {documents - len(scored)} of {documents} questions left unscored"
    samples = paired(scored, metric, value)
    if samples and samples.clusters:
        protocol += f", {count(samples)} of {len(scored)} questions differ"
        _, spread = ratio_stderr(samples.values, samples.weights, samples.clusters)
        stderr = spread * value if spread and samples.statistic == "exp" else spread  # to first order
    return Measurement(
        task,
        metric if filtered == "none" else f"{metric} ({filtered})",
        value,
        "share" if metric.startswith(SHARES) and 0 <= value <= 1 else "",
        direction(results, task, metric),
        len(scored) if scored else _counted(results, task),
        stderr if stderr is not None and math.isfinite(stderr) else None,
        protocol,
        samples,
        _guessing(scored, metric) if metric.startswith("acc") else None,
    )


def _number(value: object) -> float | None:
    """A number of Python or of numpy as a float, else None; True and False are 1 and 0."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    try:
        return float(value) if isinstance(value, Real) else None
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf


def _counted(results: Results, task: str) -> int:
    """The number of questions that lm-eval reports as scored, for results without answers."""
    if told := results.get("n-samples", {}).get(task, {}).get("effective"):
        return int(told)
    return sum(_counted(results, member) for member in _members(results, task))


def _members(results: Results, task: str) -> list[str]:
    """The single tasks of a group, each once, whatever groups within it hold them; nothing for a task."""
    within: dict[str, None] = {}
    for member in results.get("group_subtasks", {}).get(task, ()):
        within |= dict.fromkeys(_members(results, member) or [member])
    return list(within)


def answers(results: Results, task: str) -> Answers:
    """The answers of a task in the order of questions, or those of all tasks of a group one after another.

    Each bears the name of its task.
    """
    kept = results.get("samples", {})
    return [
        {**answer, "task": name}
        for name in _members(results, task) or [task]
        for answer in sorted(kept.get(name, ()), key=lambda s: int(s["doc_id"]))
    ]


def identity(answer: Answer) -> str:
    """The document that an answer is about: the task, the place in the task, and the hash of the text."""
    return f"{answer['task']}:{answer['doc_id']}:{str(answer.get('doc_hash', ''))[:12]}"


def direction(results: Results, task: str, metric: str) -> Better:
    """The direction that the task, all tasks of a group, or lm-eval's registry of metrics gives.

    "unknown" where none of them gives any, or the tasks of a group disagree.
    """
    if within := _members(results, task):
        having = [t for t in within if any(k.partition(",")[0] == metric for k in results["results"].get(t, {}))]
        said = {direction(results, t, metric) for t in having or within}
        return said.pop() if len(said) == 1 else "unknown"
    higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
    if not isinstance(higher, bool):
        import lm_eval.api.metrics  # noqa: F401 - fills the registry
        from lm_eval.api.registry import higher_is_better_registry

        higher = higher_is_better_registry.get(metric) if metric in higher_is_better_registry else None
    return "unknown" if higher is None else "higher" if higher else "lower"


def _convention(results: Results, task: str, asked: Answers, limit: float | None, cut: Mapping[str, int]) -> str:
    """The protocol: versions of lm-eval and of the task, hash of the questions, number of examples, limit and cuts."""
    shots = results.get("n-shot", {}).get(task, 0)
    first = f", first {limit:g} questions" if limit else ""
    lost = sum(cut.get(name, 0) for name in _members(results, task) or [task])
    short = f", {lost} questions cut on the left to the model's window" if lost else ""
    return (
        f"lm-eval {results['lm_eval_version']}, task version {results['versions'].get(task)}, "
        f"hash {_what_was_asked(results, task, asked)}, {shots}-shot{first}{short}"
    )


def _what_was_asked(results: Results, task: str, asked: Answers) -> str:
    """The hash of all questions to a model; for files without samples, that of the settings in the files."""
    if asked:  # as lm-eval hashes questions, prompts and targets in result files; and the generation settings
        hashes = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in asked)
        settings = {json.dumps(each, sort_keys=True, default=str) for s in asked for each in _settings(s["arguments"])}
        return hashlib.sha256((hashes + "".join(sorted(settings))).encode()).hexdigest()[:12]
    members, run = _members(results, task) or [task], results.get("config") or {}
    configs = [results.get("configs", {}).get(name, {}) for name in members]
    said: dict[str, object] = {name: [config.get(name) for config in configs] for name in PROMPTS}
    said |= {name: results.get(name) for name in ("chat_template_sha", "system_instruction_sha")}
    said |= {"gen_kwargs": run.get("gen_kwargs"), "questions": _counted(results, task)}
    if any(results.get("n-shot", {}).get(name) for name in members):  # which examples, and as whose turns
        said |= {"seed": run.get("fewshot_seed"), "turns": bool(results.get("fewshot_as_multiturn"))}
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(said, sort_keys=True, default=str))  # functions of a task
    return f"without samples {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _settings(arguments: Arguments) -> Iterator[Mapping[str, object]]:
    """The settings of `generate` among a question's arguments."""
    for each in arguments.values() if isinstance(arguments, Mapping) else arguments:
        yield from (part for part in (each.values() if isinstance(each, Mapping) else each) if isinstance(part, dict))


def paired(scored: Answers, metric: str, value: float) -> Samples | None:
    """The score of each question, where the figure is made of them by a mean, a perplexity or bits a byte.

    lm-eval's other aggregations cannot be resampled so: they keep their figure and standard error. Raises `UserError`
    for a document that is scored twice.
    """
    ids = tuple(identity(s) for s in scored)
    clusters = repeats(
        [(s["task"], s.get("doc_hash", i)) for i, s in enumerate(scored)]
    )  # rows of the data may be equal
    if twice := [one for one, other in zip(sorted(ids), sorted(ids)[1:], strict=False) if one == other]:
        raise UserError(f"lm_eval: document {twice[0]!r} is scored twice by {metric}")
    for samples in _readings([s[metric] for s in scored], ids):
        sums = math.fsum(samples.values), math.fsum(samples.weights or (1.0,) * len(ids))
        mean = sums[0] / sums[1] if sums[1] else math.nan
        wanted = math.log(value) if samples.statistic == "exp" and value > 0 else value
        if math.isclose(mean, wanted, rel_tol=1e-9, abs_tol=1e-9):
            return replace(samples, clusters=clusters)
    return None


def _readings(scores: Sequence[object], ids: tuple[str, ...]) -> Iterator[Samples]:
    """lm-eval's aggregations read scores as numbers, or as pairs of a log-likelihood and words or bytes."""
    plain = [_number(s) for s in scores]
    values = tuple(v for v in plain if v is not None)
    if values and len(values) == len(plain):
        yield Samples(values, ids=ids)
        yield Samples(tuple(-v for v in values), None, "exp", ids=ids)  # `perplexity`
    pairs = [tuple(map(_number, s)) if isinstance(s, tuple | list) and len(s) == 2 else (None,) for s in scores]
    if pairs and not any(None in pair for pair in pairs):
        lost = tuple(-float(pair[0] or 0) for pair in pairs)
        weights = tuple(float(pair[1] or 0) for pair in pairs)
        yield Samples(lost, weights, "exp", ids=ids)  # `weighted_perplexity`
        yield Samples(tuple(v / math.log(2) for v in lost), weights, ids=ids)  # `bits_per_byte`


def _guessing(scored: Answers, metric: str) -> float | None:
    """The share of right answers that guessing makes, where each question has choices and some of them are right."""
    if not scored or not all(_number(s.get(metric)) in (0, 1) for s in scored):
        return None
    # For mutual information each choice is asked a second time, without the question.
    choices = [len(s["arguments"]) // (2 if "acc_mutual_info" in s else 1) for s in scored]
    if min(choices) < 2:
        return None
    return sum(_right(s) / c for s, c in zip(scored, choices, strict=True)) / len(choices)


def _right(answer: Answer) -> int:
    """The number of right choices, which the target lists; in a file the list is text."""
    target = answer.get("target")
    if isinstance(target, str) and re.fullmatch(r"\[\d+(, \d+)*\]", target):
        target = json.loads(target)
    return len(set(target)) if isinstance(target, list) and all(isinstance(t, int) for t in target) else 1


def files(results: Results, task: str, weights: str) -> list[Attachment]:
    """`results_*.json` and `samples_*.jsonl` as lm-eval's command line writes them, for tools of lm-eval."""
    from lm_eval.loggers import EvaluationTracker

    with tempfile.TemporaryDirectory() as folder:
        tracker = EvaluationTracker(output_path=folder)
        tracker.general_config_tracker.log_experiment_args("hf", f"pretrained={weights}", None, None, False)
        plain = json.loads(json.dumps({k: v for k, v in results.items() if k != "samples"}, default=str))
        samples = {name: [_spelled(dict(s)) for s in rows] for name, rows in results["samples"].items()}
        tracker.save_results_aggregated(results=_spelled(plain), samples=samples)
        for name, rows in samples.items():
            tracker.save_results_samples(task_name=name, samples=rows)
        written = sorted(f for f in Path(folder).rglob("*") if f.is_file())
        return [Attachment(task, f"lm_eval/{f.name}", f.read_text(encoding="utf-8")) for f in written]


def _spelled(data: object) -> object:
    """Nested data with numbers that are not finite as text: NaN is `N/A`, as lm-eval writes it.

    The log-likelihood of a text that a model holds impossible is `-inf`.
    """
    if isinstance(data, float) and not math.isfinite(data):
        return "N/A" if math.isnan(data) else str(data)
    if isinstance(data, dict):
        return {key: _spelled(value) for key, value in data.items()}
    return [_spelled(value) for value in data] if isinstance(data, list | tuple) else data
