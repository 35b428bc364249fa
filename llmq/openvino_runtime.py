"""OpenVINO: the library, and the options for running a graph. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError

# It would report home. Here, for every module that imports OpenVINO, or a part of it, imports this one before.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from types import ModuleType

    from openvino import Core, Model

GRAPH = "model.xml"
LANGUAGE_GRAPH = "openvino_model.xml"
"""The graph of a language model, by OpenVINO's own name."""
PRECISION = ["runtime_options", "INFERENCE_PRECISION_HINT"]
"""The place in a graph for the precision of float operations. If unset, float32 is taken: OpenVINO's own choice would
be bfloat16 on one processor and float32 on the next."""
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
PRECISIONS: Mapping[str, Mapping[str, str]] = {
    "f32": EXACT,
    "bf16": {**EXACT, "INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
    "f16": {**EXACT, "INFERENCE_PRECISION_HINT": "f16", "KV_CACHE_PRECISION": "f16"},
    "int8": {**EXACT, "KV_CACHE_PRECISION": "u8", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"},
}
"""Precision of a language model -> the options of OpenVINO that its graph is compiled with."""
DEVICE = "cpu"
"""Graphs run on the processor."""


def openvino() -> ModuleType:
    """Import OpenVINO. Raises `UserError` without it."""
    try:
        import openvino
    except ModuleNotFoundError:
        raise UserError("this needs OpenVINO; install llmq-suite[openvino]") from None
    return openvino  # type: ignore[no-any-return]


@cache
def core() -> Core:
    """The one `Core` of this process.

    On processors with AMX each `Core` gives the thread a stack for signals, and restores the former stack when it is
    deleted. Of two, the first deletion unmaps the stack that the second restores: the next signal that Python handles
    (Ctrl-C, the end of a worker) then ends the process without a word.
    """
    return openvino().Core()


def options(core: Core, graph: Model) -> dict[str, str]:
    """The options for compiling a graph."""
    precision = graph.get_rt_info(PRECISION).astype(str) if graph.has_rt_info(PRECISION) else "f32"
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        precision = "f32"  # as OpenVINO would do silently
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}


def last_line(error: Exception) -> str:
    """The line of a library's error that says what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep progress bars and warnings of the exporting libraries off the screen."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_graph(graph: Model, path: Path, float16: bool = False) -> None:
    """Write a graph to `path` (.xml) and its constants beside it (.bin); the same graph gives the same bytes."""
    # Default names count the graphs or operations of the process: they would differ from run to run.
    graph.set_friendly_name("graph")
    for i, operation in enumerate(graph.get_ordered_ops()):
        if re.fullmatch(r"[A-Za-z]+_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{i}")
    openvino().save_model(graph, path, compress_to_fp16=float16)
    text = re.sub(r">\s+<", "><", path.read_text(encoding="utf-8"))  # a sixth is indentation
    path.write_text(text, encoding="utf-8")
