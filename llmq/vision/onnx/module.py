"""An ONNX model as a torch module, run by ONNX Runtime on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmq.errors import LlmqError, UserError
from llmq.guarded.files import library, read_bytes
from llmq.openvino_runtime import last_line
from llmq.vision.onnx.library import FILE, onnx, session

if TYPE_CHECKING:
    from onnx import ModelProto

LARGEST = 2**31 - 1
"""The most bytes of a model in one file, which is the limit of protobuf."""
CODING = ("QuantizeLinear", "DequantizeLinear")


class OnnxModule(nn.Module):
    """The model in a folder's `model.onnx`: one float tensor in, a tensor or a tuple of tensors out.

    A model of one image gets one image at a time. Each number of torch's threads has a session of its own. Weights are
    parameters; scales, zero points and shapes are buffers. They are copies of what the sessions hold.
    """

    precision = "float32"

    def __init__(self, folder: Path):
        super().__init__()
        self.file = folder / FILE
        self.model, model = read(self.file)
        self.sessions: dict[int, Any] = {}
        self.weights = nn.ParameterList()
        for i, (array, is_weight) in enumerate(constants(model)):
            tensor = torch.from_numpy(array.copy())
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise UserError(
                    f"{str(self.file)!r}: {model.graph.initializer[i].name!r} holds values that are no number"
                )
            if is_weight:
                self.weights.append(nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(f"constant_{i}", tensor)
        self._session()  # an operation that the runtime does not know is told at once
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs for an input, on the device of the input."""
        held = inputs.detach().to("cpu", torch.float32).contiguous()
        takes_one = self._session().get_inputs()[0].shape[0] == 1
        each = [self._outputs(one.numpy()) for one in (torch.split(held, 1) if takes_one else [held])]
        whole = each[0] if len(each) == 1 else [torch.cat(parts) for parts in zip(*each, strict=True)]
        tensors = [t.to(inputs.device) for t in whole]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def _outputs(self, held: np.ndarray) -> list[Tensor]:
        runs = self._session()
        try:
            return [torch.from_numpy(output) for output in runs.run(None, {runs.get_inputs()[0].name: held})]
        except Exception as error:  # noqa: BLE001  # the runtime's errors have no class in common
            raise LlmqError(f"the ONNX model takes no input {list(held.shape)}: {last_line(error)}") from None

    def _session(self) -> Any:
        threads = torch.get_num_threads()
        if threads not in self.sessions:
            with library(self.file, "model that ONNX Runtime runs"):
                self.sessions[threads] = session(self.model, threads)
        return self.sessions[threads]


def read(file: Path) -> tuple[bytes, ModelProto]:
    """The bytes of an ONNX file and the model in them. Raises `UserError` for a file that is not whole."""
    held = read_bytes(file, LARGEST)
    with library(file, "ONNX model; make the stage again"):
        model = onnx().load_model_from_string(held)
        if any(tensor.data_location or tensor.external_data for tensor in model.graph.initializer):
            raise UserError(f"{str(file)!r} keeps weights in other files; one file is what is read")
        onnx().checker.check_model(model)
    return held, model


def constants(model: ModelProto) -> Iterator[tuple[np.ndarray, bool]]:
    """Every constant of a model, and True for a weight: not a scale, a zero point, a shape or an index."""
    coding = {name for node in model.graph.node if node.op_type in CODING for name in list(node.input)[1:]}
    for tensor in model.graph.initializer:
        array = onnx().numpy_helper.to_array(tensor)
        is_weight = array.dtype in (np.float32, np.float16, np.int8) and tensor.name not in coding
        yield array, is_weight
