"""The model card of a stage: a `README.md` beside the weights, with the table, the base, the recipe and the limits."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.files import CARD, write_text
from llmq.harmless import fenced
from llmq.harmless import markdown as inline
from llmq.report.first import data_of, machine_of, model_of, steps_of
from llmq.report.rows import LEGEND, alarms, rows
from llmq.source import to_yaml
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.report import Report

KINDS = {
    "causal-lm": "text-generation", "classifier": "image-classification", "detector": "object-detection",
    "gan": "unconditional-image-generation", "super-resolution": "image-to-image",
}  # fmt: skip
"""The hub's name of the task of each kind of model."""
WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx", "*.xml")


MARKUP = re.compile(r"[\s<>{}|]")


def write(report: "Report", run: Path, base: Path, kind: str) -> None:
    """Write the card of every stage of a run that holds a model; `base` is the folder of the untouched weights."""
    for stage in report.stages:
        folder = run / stage["folder"]
        if any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
            write_text(folder / CARD, draw(report, stage, base, kind))


def draw(report: "Report", stage: JsonObject, base: Path, kind: str) -> str:
    """The card of one stage."""
    name, model = stage["name"], Path(model_of(report)).name if _is_path(model_of(report)) else model_of(report)
    steps = [word for word, _ in steps_of(report)]
    made = steps[: [s["name"] for s in report.stages].index(name)]
    licence, base_model = _of_base(base), model_of(report) if _is_on_hub(model_of(report)) else None
    title = f"{model}: {', '.join(made) or 'untouched'}"
    machine = f"{machine_of(report)}, llmq {report.environment.get('llmq', '')}"
    limits = [line for line in alarms(report) if f" {name}: " in line] or [
        "The figures hold for the data, the settings and the machine above; nothing else was measured."
    ]
    parts = [
        f"---\n{_metadata(report, name, title, kind, licence, base_model)}---",
        f"# {inline(title)}",
        f"Made by llmq from {inline(model)}. Licence: {licence or 'that of the base, which is not known here'}.",
        "## Measured",
        _table(report, name),
        f"{LEGEND} {inline(machine)}.",
        "## Recipe",
        fenced(to_yaml(_portable(report.recipe))),
        "## Limits",
        "\n".join(f"- {inline(line)}" for line in limits),
    ]
    return "\n\n".join(parts) + "\n"


def _table(report: "Report", stage: str) -> str:
    """The figures of the stage beside those of the base."""
    if not report.measured:
        return "Nothing."
    places = dict.fromkeys((0, report.measured.index(stage) if stage in report.measured else 0))
    lines = [f"| figure | {' | '.join(inline(report.measured[i]) for i in places)} |", "|---|" + "---:|" * len(places)]
    for row in rows(report):
        cells = " | ".join(inline(row.cells[i]) for i in places)
        lines.append(f"| {inline(row.task)} {inline(row.label)} | {cells} |")
    return "\n".join(lines)


def _metadata(report: "Report", stage: str, title: str, kind: str, licence: str, base: str | None) -> str:
    """The head that the hub reads, figures included."""
    from huggingface_hub import EvalResult, ModelCardData

    task = KINDS.get(kind, kind)
    data = ", ".join(" ".join(filter(None, _portable(name.split(" ", 1)))) for name in data_of(report)) or "none"
    results = [
        EvalResult(task, data, data, m["metric"], m["value"], metric_name=f"{m['task']} {m['metric']}")
        for m in report.measurements
        if m["stage"] == stage
    ]
    more = {"eval_results": results, "model_name": title} if results else {}
    about = ModelCardData(
        base_model=base, license=licence or None, pipeline_tag=task, tags=["llmq", *_tags(report)], **more
    )
    return f"{about.to_yaml()}\n"


def _tags(report: "Report") -> Iterator[str]:
    yield from dict.fromkeys(word.replace(".", "-") for word, _ in steps_of(report))


def _of_base(base: Path) -> str:
    """The licence that the card of the base names; empty if it has none."""
    from huggingface_hub import ModelCard

    file = base / CARD
    if not file.is_file():
        return ""
    try:
        return str(ModelCard.load(file, ignore_metadata_errors=True).data.license or "")
    except (ValueError, OSError):  # a README that is no card
        return ""


def _is_path(text: str) -> bool:
    """True for a folder or file; a prompt or a chat template is none, however long, with however many slashes."""
    begins = text.startswith(("/", "./", "../", "~")) and "\n" not in text
    return begins or os.path.exists(text) or (text.count("/") > 1 and not MARKUP.search(text))


def _is_on_hub(model: str) -> bool:
    """True for an id of the hub, the one name of a base that the hub takes: a word such as smollm2-135m is none."""
    is_file = model.endswith((".gguf", ".onnx", ".xml", ".safetensors"))
    return not is_file and not _is_path(model) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model))


def _portable(value: Any) -> Any:
    """The recipe without the folders of this machine: of each path the last part stays."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value
