"""OpenVINO: the library, and how it is told to run a graph. It needs no torch."""

import sys
from functools import cache
from typing import Any

from llmq.errors import UserError

GRAPH = "model.xml"
PRECISION = ["runtime_options", "INFERENCE_PRECISION_HINT"]
"""Where a graph says what its float parts are computed in. Unsaid it is float32: OpenVINO's own choice would be
bfloat16 on one processor and float32 on the next."""
DEVICE = "cpu"
"""Where graphs run."""


def openvino() -> Any:
    """The library, imported so that it reports nothing home: without `openvino_telemetry` it has nobody to tell."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ModuleNotFoundError:
        raise UserError("this needs OpenVINO; install llmq-suite[openvino]") from None
    return openvino


@cache
def core() -> Any:
    """The one `Core` of this process.

    On processors with AMX each `Core` gives the thread a stack for signals, and takes back the one it found when it
    goes. Of two, the first to go unmaps what the second takes back: the next signal that Python handles (Ctrl-C, the
    end of a worker) then ends the process without a word.
    """
    return openvino().Core()


def options(core: Any, graph: Any) -> dict[str, str]:
    """What a graph is compiled with."""
    precision = graph.get_rt_info(PRECISION).astype(str) if graph.has_rt_info(PRECISION) else "f32"
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        precision = "f32"  # what OpenVINO would do, unsaid
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
