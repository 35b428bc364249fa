"""ONNX and ONNX Runtime: the libraries, and the options of a session. Nothing here imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmq.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

FILE = "model.onnx"
SETTINGS = "llmq"
"""The key of a model's settings among the properties of its file."""
OPSET = 17
"""The version of ONNX's operations: the oldest with all that is needed, so that most engines know it."""


def onnx() -> ModuleType:
    """Import ONNX. Raises `UserError` if it is not installed."""
    try:
        import onnx.helper
        import onnx.numpy_helper
    except ModuleNotFoundError:
        raise UserError("this needs ONNX; pip install llmq-suite[onnx]") from None
    return onnx  # type: ignore[no-any-return]


def onnxruntime() -> ModuleType:
    """Import ONNX Runtime. Raises `UserError` if it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError("this needs ONNX Runtime; pip install llmq-suite[onnx]") from None
    return onnxruntime  # type: ignore[no-any-return]


def session(model: bytes, threads: int) -> Any:
    """A session of ONNX Runtime on the processor, on so many threads."""
    library = onnxruntime()
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    # Without VNNI, sums of products of int8 would overflow.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # By default, activations that meet int8 weights would be rounded to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
