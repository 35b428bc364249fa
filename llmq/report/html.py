"""The report as one self-contained page."""

import base64
import json
import shlex
from dataclasses import asdict, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError, visible
from llmq.guarded.files import read_json_object
from llmq.harmless import visible_within
from llmq.report import charts, distributions, first, forest, layers, samples
from llmq.report.facts import facts
from llmq.report.rows import (
    COMPARISON_LEGEND,
    FOLDED,
    LEGEND,
    Row,
    compared_rows,
    comparison_notes,
    exhibits,
    notes,
    rows,
    summary,
)
from llmq.runs.paths import picture, within
from llmq.source import to_yaml
from llmq.types import JsonObject

if TYPE_CHECKING:
    from jinja2 import Environment

    from llmq.judge.comparisons import Comparisons
    from llmq.report import Report

UNDRAWN = FOLDED | {"psnr_gain"}
"""Metrics that the forest leaves out; a gain over bicubic differs from the base's as the PSNR does."""
OPENED_BY = {
    "gguf": 'cd SHELL && llama-cli -m model.gguf -p "…"    # llama.cpp',
    "onnx": 'import onnxruntime\nsession = onnxruntime.InferenceSession(PLACE + "/model.onnx")',
    "openvino": 'import openvino\nnet = openvino.Core().compile_model(PLACE + "/model.xml", "CPU")',
}
"""The lines that open a stage of each runtime without llmq."""
TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    "model = AutoModelForCausalLM.from_pretrained(PLACE)\ntokenizer = AutoTokenizer.from_pretrained(PLACE)"
)
PEFT = (
    "from peft import AutoPeftModelForCausalLM\n"
    "model = AutoPeftModelForCausalLM.from_pretrained(PLACE)    # where base_model_name_or_path is there"
)
NEEDED = {
    "gptq": "optimum and gptqmodel",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
}
"""The packages besides transformers that open the weights of each method."""
GENAI = 'import openvino_genai\nmodel = openvino_genai.LLMPipeline(PLACE, "CPU")'


def framed(report: "Report") -> str:
    """The page inside a frame of its own, so that its style stays off the page around it."""
    page = escape(draw(report, report.folder), quote=True)
    return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width: 100%; height: 40rem; border: 0"></iframe>'


def draw(report: "Report", folder: Path) -> str:
    """The page with all pictures embedded; those of exhibits are read from the run's `folder`."""

    def inside(file: str) -> str:
        return f"data:image/png;base64,{base64.b64encode(picture(folder, file)).decode()}"

    report = type(report)(**visible_within(asdict(report)))
    last = report.measured[-1] if report.measured else ""
    known = samples.scored(report, folder)
    told = facts(report, rows(report))
    told.pop("How each figure was taken")  # each protocol stands at its metric
    return _rendered(
        "page.html.j2",
        names=report.columns,
        report=report,
        model=first.model_of(report),
        steps=first.steps_of(report),
        origin=first.origin(report),
        last=last,
        cards=list(first.cards(report, last)),
        summary=summary(report),
        rows=list(rows(report)),
        legend=LEGEND,
        notes=notes(report),
        forest=forest.draw(report.measurements, report.comparisons, UNDRAWN, _base_of(report)),
        charts=charts.draw(report),
        layers=layers.draw(report, folder),
        distributions=distributions.draw(report, known, FOLDED),
        flips=visible_within([asdict(f) for f in samples.flips(report, folder, known) if f.metric not in FOLDED]),
        exhibits=exhibits(report),
        inside=inside,
        facts=told,
        recipe=to_yaml(report.recipe),
        commands=_commands(report, folder),
    )


def _base_of(report: "Report") -> str:
    return next((str(c["against"]) for c in report.comparisons), "the base")


def draw_comparison(compared: "Comparisons") -> str:
    """The page of results beside the first of them."""
    told = visible_within(compared.plain())
    return _rendered(
        "compared.html.j2",
        names=told["results"],
        rows=[_seen(row) for row in compared_rows(compared)],
        legend=COMPARISON_LEGEND,
        notes=visible_within(list(comparison_notes(compared))),
        forest=forest.draw(told["measurements"], told["comparisons"], UNDRAWN, told["results"][0]),
        sees=True,
    )


def _seen(row: Row) -> Row:
    return replace(row, task=visible(row.task), metric=visible(row.metric), convention=visible(row.convention))


def _rendered(template: str, **values: object) -> str:
    return templates().get_template(template).render(**values)


@cache
def templates() -> "Environment":
    """The templates of pages, each compiled once a process."""
    from jinja2 import Environment, FileSystemLoader

    return Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)


def _commands(report: "Report", folder: Path) -> dict[str, str]:
    """Title -> lines to copy: the run again, and the last stage opened."""
    run, last = str(report.environment.get("run", folder)), report.stages[-1].get("folder")
    found = {}
    if "steps" in report.recipe:
        found["Run it again, and see what differs"] = f"llmq replay {shlex.quote(run)}"
    try:
        stage = read_json_object(within(folder, f"{last}/artifact.json", "report.json"))
    except UserError:  # measured where it lay, outside of this run
        return found
    place = json.dumps(f"{run}/{last}", ensure_ascii=False)
    found["Open the last stage"] = f"import llmq\nwith llmq.open({place}) as loaded:\n    loaded.module"
    if lines := _opened_by(stage, folder / str(last)):
        found["Open it without llmq"] = lines.replace("PLACE", place).replace("SHELL", shlex.quote(f"{run}/{last}"))
    return found


def _opened_by(stage: JsonObject, folder: Path) -> str:
    text = "models.causal_lm" in stage.get("model", {})
    if stage.get("runtime") == "openvino" and text:
        return GENAI
    if stage.get("runtime") in OPENED_BY:
        return OPENED_BY[stage["runtime"]]
    if not text or not stage.get("weights"):
        return ""
    return PEFT if stage.get("adapter") else _needing(folder) + TRANSFORMERS


def _needing(folder: Path) -> str:
    """The packages without which transformers does not open packed weights, as a comment; empty where it does."""
    file = folder / "config.json"
    told = read_json_object(file).get("quantization_config") if file.is_file() else None
    method = str(told.get("quant_method", "")) if isinstance(told, dict) else ""
    return f"# needs {NEEDED[method]}\n" if method in NEEDED else ""
