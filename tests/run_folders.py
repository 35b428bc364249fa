"""Run folders as a run leaves them, with measurements that a test makes up."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llmq.artifact import Artifact, Stage
from llmq.files import write_json
from llmq.questions import write_samples
from llmq.report import Report
from llmq.statistics.estimates import figure
from llmq.types import Measurement, Samples

FACTS = {"data_sha256": {}, "libraries": {}}


def perplexity(losses, tokens=100.0, convention="512-token windows", vocabulary=50_000.0) -> Measurement:
    """Token perplexity from the mean loss of each window."""
    sums = tuple(float(x) * tokens for x in losses)
    samples = Samples(sums, (tokens,) * len(sums), "exp")
    value = float(figure(samples)[0])
    return Measurement(
        "perplexity", "token_perplexity", value, "per token", "lower", len(sums), 0.1, convention, samples, vocabulary
    )


def accuracy(answers, task="arc_easy", metric="acc", chance: float | None = 0.25, convention="hash a, 0-shot"):
    """Share of right answers."""
    samples = Samples(tuple(map(float, answers)))
    share = float(np.mean(samples.values))
    n = len(samples.values)
    spread = (share * (1 - share) / n) ** 0.5
    return Measurement(task, metric, share, "share", "higher", n, spread, convention, samples, chance)


def size(megabytes: float) -> Measurement:
    """An exact figure."""
    return Measurement("size", "bytes_on_disk", 1e6 * megabytes, "bytes", "lower", 1, 0.0, "files", exact=True)


def speed(rates: Sequence[float]) -> Measurement:
    """Decoding, in rounds."""
    samples = Samples(tuple(map(float, rates)), statistic="quantile")
    value = float(np.median(rates))
    return Measurement(
        "speed", "decode_tokens_per_second", value, "tokens/s", "higher", len(rates), 1.0, "batch 1", samples
    )


def write_run(folder: Path, stages: Mapping[str, Sequence[Measurement]]) -> Path:
    """A run whose first stage is the one that the others are set beside; figures of `speed` are those of clocks."""
    for name, found in stages.items():
        (folder / name).mkdir(parents=True)
        for file, kept in (
            ("clocks", [m for m in found if m.task == "speed"]),
            ("measurements", [m for m in found if m.task != "speed"]),
        ):
            write_samples(kept, folder / name / "samples")
            write_json(folder / name / f"{file}.json", {"measurements": [asdict(m) for m in kept], "exhibits": []})
    whole = [Stage(n, Artifact(None, folder), tuple(found)) for n, found in stages.items()]  # type: ignore[arg-type]
    write_json(folder / "report.json", asdict(Report.of({}, FACTS, whole, next(iter(stages)))))
    return folder
