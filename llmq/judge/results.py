"""Measurements read from files: those of a run, of one stage, or of lm-eval's command line."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, UserError, did_you_mean
from llmq.guarded.files import library, parse_json, read_json, read_text
from llmq.runs import paths as run_paths
from llmq.runs.paths import check_schema, within
from llmq.types import JsonObject, Measurement

Key = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """The figures of one model. Those of one `run` were taken together, and clocks in turn."""

    name: str
    run: Path
    measurements: tuple[Measurement, ...]
    timed: frozenset[Key] = frozenset()
    """The figures of clocks, which only pair within their run."""
    stored: str = ""
    """The dtype of the stored weights, where the report of the run says so."""
    target: str = ""
    """What `llmq eval` was asked to measure; empty in the run of a recipe."""

    @property
    def figures(self) -> dict[Key, Measurement]:
        """The measurements by task and metric."""
        return {(m.task, m.metric): m for m in self.measurements}


def run(folder: Path) -> dict[str, Result]:
    """The measured stages of a run in their order; the others are compared with the first."""
    with library(folder, "run"):
        return _run(folder)


def _run(folder: Path) -> dict[str, Result]:
    run_paths.check(folder)
    report = _json(folder / "report.json")
    check_schema(report, folder / "report.json")
    try:
        measured = list(dict.fromkeys(m["stage"] for m in report["measurements"]))
        names = [s["name"] for s in report.get("stages", ())]
        asked = [s["name"] for s in report.get("stages", ()) if s.get("asked")]  # older reports have none
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{str(folder / 'report.json')!r} is no report of llmq") from None
    if not measured:
        raise UserError(f"{str(folder)!r}: nothing was measured in this run; give its recipe something to 'evaluate'")
    for end in (*asked[:1], *asked[-1:]):
        if end not in measured:  # another stage would be taken for the base, or for the last one
            raise UserError(f"{str(folder)!r}: all tasks failed at {end}; ask them again with llmq run … --resume")
    before = names[: names.index(asked[0])] if asked else []  # stages before the base keep what their steps measured
    return {n: _stage(within(folder, n, folder / "report.json"), report) for n in measured if n not in before}


def read(target: str) -> list[Result]:
    """The results in `target`: all stages of a run, one stage, or the results of lm-eval's command line."""
    with library(target, "run, stage or result file"):
        return _read(target)


def _read(target: str) -> list[Result]:
    path = Path(target)
    if not path.exists():
        raise UserError(f"there is no run, stage or result file {target!r}{did_you_mean(path.name, _near(path))}")
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{target!r} is a model; measure it first (llmq eval {target} --out NAME), then name NAME")
    if path.is_file():
        return [_harness(path)]
    if (path / "report.json").is_file():
        return list(run(path).values())
    if (path / "measurements.json").is_file():
        run_paths.check(path)
        whole = path.resolve().parent
        if (whole / "report.json").is_file():
            return [_stage(path.resolve(), _json(whole / "report.json"))]
        return [Result(path.name, whole, tuple(_kept(path / "measurements.json")))]
    files = sorted(path.rglob("results_*.json"))
    if len(files) == 1:
        return [_harness(files[0])]
    if files:
        raise UserError(f"{target!r} holds {len(files)} result files; name one, such as {str(files[-1])!r}")
    if (path / "recipe.yaml").is_file():
        raise UserError(f"{target!r} is a run without a report; finish it with: llmq run … --out {target} --resume")
    raise UserError(f"{target!r} is no run or stage of llmq, and holds no results_*.json of lm-eval")


def _near(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


def _stage(folder: Path, report: JsonObject) -> Result:
    kept, clocks = folder / "measurements.json", folder / "clocks.json"
    timed = list(_kept(clocks)) if clocks.is_file() else []
    found = [*(_kept(kept) if kept.is_file() else ()), *timed]
    have = {(m.task, m.metric) for m in found}
    # Reports from before `clocks.json` existed hold the figures of clocks without samples.
    try:
        bare = [Measurement.of(_without_stage(m)) for m in report["measurements"] if m["stage"] == folder.name]
    except (KeyError, TypeError):
        raise UserError(f"{str(folder.parent / 'report.json')!r} is no report of llmq") from None
    except LlmqError as error:
        raise UserError(f"{str(folder.parent / 'report.json')!r}: {error}") from None
    rest = [m for m in bare if (m.task, m.metric) not in have]
    of_clocks = frozenset((m.task, m.metric) for m in (*timed, *rest))
    stored = next((s.get("stored", "") for s in report.get("stages", ()) if s["name"] == folder.name), "")
    target = str(report.get("recipe", {}).get("target", ""))
    return Result(folder.name, folder.resolve().parent, (*found, *rest), of_clocks, stored, target)


def _without_stage(entry: JsonObject) -> JsonObject:
    return {k: v for k, v in entry.items() if k != "stage"}


def _kept(file: Path) -> Iterator[Measurement]:
    try:
        for entry in _json(file)["measurements"]:
            yield Measurement.of(entry)
    except (KeyError, TypeError):
        raise UserError(f"{str(file)!r} holds no measurements of llmq") from None
    except LlmqError as error:  # written before figures had to be finite
        raise UserError(f"{str(file)!r}: {error}") from None


def _json(file: Path) -> Any:
    return read_json(file)


def _harness(file: Path) -> Result:
    """A `results_*.json` with the `samples_*.jsonl` beside it that bear the same date."""
    from llmq.harness.results import measurements

    results = _json(file)
    if not isinstance(results, dict) or not {"results", "versions", "lm_eval_version"} <= results.keys():
        raise UserError(f"{str(file)!r} is no result file of lm-eval (results_*.json) and no run of llmq")
    _check_shape(file, results)
    date = file.stem.rpartition("_")[2]
    samples = {task: _lines(within(file.parent, f"samples_{task}_{date}.jsonl", file)) for task in results["results"]}
    config = results.get("config") or {}
    found = measurements({**results, "samples": {t: s for t, s in samples.items() if s}}, config.get("limit"))
    name = Path(str(results.get("model_name") or file.stem)).name
    try:
        return Result(f"{name} (lm-eval)", file.resolve(), tuple(found))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{str(file)!r}, or samples beside it, lack an entry of today's lm-eval: {error}") from None


def _check_shape(file: Path, results: JsonObject) -> None:
    """Raise `UserError` for the first part of a result file that is not of the kind that lm-eval writes."""
    told = ("n-shot", "n-samples", "higher_is_better", "configs", "group_subtasks", "config")
    parts = {key: results[key] for key in ("results", "versions", *(k for k in told if results.get(k) is not None))}
    figures = parts["results"] if isinstance(parts["results"], dict) else {}
    parts |= {f"results.{task}": metrics for task, metrics in figures.items()}
    for deep in ("n-samples", "higher_is_better", "configs"):
        inner = parts.get(deep)
        parts |= {f"{deep}.{k}": v for k, v in inner.items()} if isinstance(inner, dict) else {}
    for place, part in parts.items():
        if not isinstance(part, dict):
            raise UserError(f"{str(file)!r}: {place!r} is {part!r:.40}, and lm-eval writes a mapping there")
    for task, metrics in figures.items():
        for key, value in metrics.items():
            if "," not in key or value == "N/A" or key.startswith("bypass"):
                continue
            if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise UserError(
                    f"{str(file)!r}: 'results.{task}.{key}' is {value!r:.40}, and should be a finite number"
                )


def _lines(file: Path) -> list[JsonObject]:
    if not file.is_file():
        return []
    lines = enumerate(read_text(file).split("\n"), 1)
    rows = [parse_json(line, f"{file}:{number}") for number, line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{str(file)!r} holds lines that are no JSON objects, and lm-eval writes one a question")
    return rows
