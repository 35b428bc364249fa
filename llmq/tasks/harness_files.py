"""lm-eval's own files beside ours, so that its tools can read what was found."""

import json
import tempfile
from collections.abc import Mapping
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from llmq.types import Attachment

FOLDER = "lm_eval"
"""Where in a stage's folder they stand."""


def spelled(data: Any) -> Any:
    """Nested data with the numbers that JSON has none for as text: NaN is `N/A`, as lm-eval says it.

    The log-likelihood of what a model holds impossible is `-inf`.
    """
    if isinstance(data, float) and not isfinite(data):
        return "N/A" if isnan(data) else str(data)
    if isinstance(data, dict):
        return {key: spelled(value) for key, value in data.items()}
    return type(data)(map(spelled, data)) if type(data) in (list, tuple) else data


def files(results: Mapping[str, Any], task: str, weights: str) -> list[Attachment]:
    """`results_*.json` and `samples_*.jsonl` as lm-eval's command line writes them."""
    from lm_eval.loggers import EvaluationTracker

    with tempfile.TemporaryDirectory() as folder:
        tracker = EvaluationTracker(output_path=folder)
        tracker.general_config_tracker.log_experiment_args("hf", f"pretrained={weights}", None, None, False)
        plain = json.loads(json.dumps({k: v for k, v in results.items() if k != "samples"}, default=str))
        plain = spelled(plain)
        samples = {name: [spelled(dict(s)) for s in its] for name, its in results["samples"].items()}
        tracker.save_results_aggregated(results=plain, samples=samples)
        for name, its in samples.items():
            tracker.save_results_samples(task_name=name, samples=its)
        written = sorted(f for f in Path(folder).rglob("*") if f.is_file())
        return [Attachment(task, f"{FOLDER}/{f.name}", f.read_text(encoding="utf-8")) for f in written]
