"""What lm-eval's results say, as figures: of a run in this process, or out of the files of its command line."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmq.types import Measurement, Samples

SHARES = ("acc", "exact_match", "f1", "pass_at")
Answers = Sequence[Mapping[str, Any]]


def measurements(results: Mapping[str, Any], limit: float | None = None) -> Iterator[Measurement]:
    """A figure for each task, metric and filter of lm-eval's `results`, with the samples that stand under `samples`."""
    for task, figures in results["results"].items():
        samples = answers(results, task)
        n = results.get("n-samples", {}).get(task, {}).get("effective", len(samples))
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{filtered}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
            yield Measurement(
                task,
                metric if filtered == "none" else f"{metric} ({filtered})",
                float(value),
                "share" if metric.startswith(SHARES) and 0 <= value <= 1 else "",
                "higher" if higher else "lower",
                n,
                stderr if isinstance(stderr, float) else None,
                convention(results, task, limit),
                paired(samples, metric, filtered, float(value)),
                guessing(samples, metric) if metric.startswith("acc") else None,
            )


def answers(results: Mapping[str, Any], task: str) -> list[Mapping[str, Any]]:
    """The answers to a task's questions in their order, or to those of a group's tasks one after another."""
    found = results.get("samples", {})
    if task in found:
        return sorted(found[task], key=lambda s: int(s["doc_id"]))
    return [answer for member in results.get("group_subtasks", {}).get(task, ()) for answer in answers(results, member)]


def convention(results: Mapping[str, Any], task: str, limit: float | None) -> str:
    """Version of the harness and of the task, the hash of what was asked, and how."""
    shots = results.get("n-shot", {}).get(task, 0)
    asked = f", first {limit:g} questions" if limit else ""
    return (
        f"lm-eval {results['lm_eval_version']}, task version {results['versions'].get(task)}, "
        f"hash {_what_was_asked(results, task)}, {shots}-shot{asked}"
    )


def _what_was_asked(results: Mapping[str, Any], task: str) -> str:
    """The hash of all that a model was asked; of files without samples, of how they say that it was asked."""
    if samples := answers(results, task):
        return task_hash(samples)[:12]
    config = results.get("configs", {}).get(task, {})
    said = {name: config.get(name) for name in ("dataset_path", "dataset_name", "test_split", "generation_kwargs")}
    said |= {name: results.get(name) for name in ("chat_template_sha", "system_instruction_sha")}
    said["gen_kwargs"] = (results.get("config") or {}).get("gen_kwargs")
    return f"without samples {hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]}"


def paired(samples: Answers, metric: str, filtered: str, value: float) -> Samples | None:
    """The score of each question, where the figure is their plain mean.

    lm-eval's other aggregations cannot be resampled so: they keep their figure and standard error.
    """
    scores = [s[metric] for s in samples if s.get("filter", "none") == filtered and metric in s]
    if not scores or not all(isinstance(s, int | float) for s in scores):
        return None
    is_mean = abs(sum(scores) / len(scores) - value) < 1e-9
    return Samples(tuple(float(s) for s in scores)) if is_mean else None


def guessing(samples: Answers, metric: str) -> float | None:
    """The share of right answers that guessing makes, where each question has choices and one of them is right."""
    if not all(s.get(metric) in (0, 1) for s in samples):
        return None
    choices = [len(s["arguments"]) for s in samples]
    return sum(1 / c for c in choices) / len(choices) if choices and min(choices) > 1 else None


def task_hash(samples: Answers) -> str:
    """As the harness computes it when it writes its results: questions, prompts, targets; and how to generate."""
    asked = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    how = sorted({json.dumps(its, sort_keys=True, default=str) for s in samples for its in _settings(s["arguments"])})
    return hashlib.sha256((asked + "".join(how)).encode()).hexdigest()


def _settings(arguments: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of `generate` among a question's arguments, as they are in memory or in a file."""
    for each in arguments.values() if isinstance(arguments, dict) else arguments:
        yield from (its for its in (each.values() if isinstance(each, dict) else each) if isinstance(its, dict))
