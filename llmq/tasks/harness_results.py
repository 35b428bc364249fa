"""What lm-eval's results say, as figures: of a run in this process, or out of the files of its command line."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmq.types import Measurement, Samples

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
                "share" if metric.startswith(("acc", "exact_match", "f1", "pass_at")) else "",
                "higher" if higher else "lower",
                n,
                stderr if isinstance(stderr, float) else None,
                convention(results, task, limit),
                paired(samples, metric, filtered, float(value)),
                guessing(samples) if metric.startswith("acc") else None,
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
        f"hash {task_hash(answers(results, task))[:12]}, {shots}-shot{asked}"
    )


def paired(samples: Answers, metric: str, filtered: str, value: float) -> Samples | None:
    """The score of each question, where the figure is their plain mean.

    lm-eval's other aggregations cannot be resampled so: they keep their figure and standard error.
    """
    scores = [s[metric] for s in samples if s.get("filter", "none") == filtered and metric in s]
    if not scores or not all(isinstance(s, int | float) for s in scores):
        return None
    is_mean = abs(sum(scores) / len(scores) - value) < 1e-9
    return Samples(tuple(float(s) for s in scores)) if is_mean else None


def guessing(samples: Answers) -> float | None:
    """The share of right answers that guessing makes, where each question has choices."""
    choices = [len(s["arguments"]) for s in samples]
    return sum(1 / c for c in choices) / len(choices) if choices and min(choices) > 1 else None


def task_hash(samples: Answers) -> str:
    """As the harness computes it when it writes its own results: questions, prompts and targets."""
    asked = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    return hashlib.sha256(asked.encode()).hexdigest()
