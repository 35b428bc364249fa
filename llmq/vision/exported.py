"""An exported graph as a torch module, run by OpenVINO on the processor."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmq.environment import library_version
from llmq.errors import LlmqError, UserError
from llmq.graph_weights import BITS, CODES, StoredWeight, coding_of, kind_of
from llmq.openvino_runtime import GRAPH, core, last_line, openvino, options

if TYPE_CHECKING:
    from openvino import CompiledModel, Core, Model, Node

PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
SHAPES = 9
"""The most input shapes that stay compiled: the tiles of one image have as many. A graph for one shape runs up to a
third faster than a graph for all shapes, and takes a fifth of a second to compile."""


class ExportedModule(nn.Module):
    """The graph in a folder's `model.xml`: one float tensor in, a tensor or a tuple of tensors out.

    The graph is compiled for each shape of input and each number of torch's threads. Weights are parameters, or modules
    where they are codes; scales and zero points are buffers. All lie in the memory of the graph: do not write to them.
    """

    def __init__(self, graph: Path | Model):
        super().__init__()
        self.core = core()
        self.graph = _read(self.core, graph) if isinstance(graph, Path) else graph
        self.options = options(self.core, self.graph)
        precision = self.options["INFERENCE_PRECISION_HINT"]
        self.precision = PRECISIONS.get(precision, precision)
        self.compiled: OrderedDict[tuple[tuple[int, ...], int], _Compiled] = OrderedDict()
        weights = [constant for constant, is_weight in constants(self.graph) if is_weight]
        coded, plain = [], []
        for constant in weights:
            zero, _ = coding_of(constant)
            if zero is not None or kind_of(constant) in CODES:
                coded.append(StoredWeight(constant, zero, []))
            else:
                plain.append(nn.Parameter(_as_tensor(constant), requires_grad=False))
        self.codes, self.weights = nn.ModuleList(coded), nn.ParameterList(plain)
        others = (_as_tensor(constant) for constant, is_weight in constants(self.graph) if not is_weight)
        for i, tensor in enumerate(others):
            self.register_buffer(f"constant_{i}", tensor)
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs for an input, in new memory on the device of the input."""
        held = inputs.detach().to("cpu", torch.float32).contiguous()
        outputs = self._outputs(held)
        if inputs.device.type != "cpu":
            outputs = [t.to(inputs.device) for t in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _outputs(self, held: Tensor) -> list[Tensor]:
        """The outputs; a graph for one image, as somebody exported it, gets one image at a time."""
        if len(held) == 1 or not is_for_one(self.graph):
            return self._for(tuple(held.shape))(held)
        each = [self._for(tuple(one.shape))(one) for one in torch.split(held, 1)]
        return [torch.cat(parts) for parts in zip(*each, strict=True)]

    def _for(self, shape: tuple[int, ...]) -> _Compiled:
        key = shape, torch.get_num_threads()
        if key not in self.compiled:
            wanted = self.graph.input(0).partial_shape
            if not wanted.compatible(openvino().PartialShape(list(shape))):
                raise LlmqError(f"the exported graph takes inputs of {wanted}, and this one is {list(shape)}")
            if len(self.compiled) == SHAPES:
                self.compiled.popitem(last=False)  # the shape that was not used for longest
            graph = self.graph.clone()  # reshaping changes a graph in place
            try:
                graph.reshape(list(shape))
            except RuntimeError as error:  # such as an image smaller than a kernel
                raise LlmqError(f"the exported graph takes no input {list(shape)}: {last_line(error)}") from None
            threads = {"INFERENCE_NUM_THREADS": key[1]}
            try:
                self.compiled[key] = _Compiled(self.core.compile_model(graph, "CPU", {**self.options, **threads}))
            except RuntimeError as error:
                raise LlmqError(
                    f"OpenVINO {library_version('openvino')} cannot compile the exported graph for an input "
                    f"{list(shape)}: {last_line(error)}; make the stage by another step, or take another version of "
                    "OpenVINO"
                ) from None
        self.compiled.move_to_end(key)
        return self.compiled[key]


def is_for_one(graph: Model) -> bool:
    """True for a graph that takes one image at a time."""
    return bool(graph.input(0).partial_shape[0].is_static)


class _Compiled:
    """A graph compiled for one shape; neither input nor outputs are copied."""

    def __init__(self, compiled: CompiledModel):
        self.tensor = openvino().Tensor
        self.request = compiled.create_infer_request()
        self.fixed = not any(output.partial_shape.is_dynamic for output in compiled.outputs)
        outputs = compiled.outputs if self.fixed else ()
        self.shapes = [(tuple(o.shape), getattr(torch, o.element_type.to_dtype().name)) for o in outputs]

    def __call__(self, held: Tensor) -> list[Tensor]:
        if not self.fixed:  # as many rows as the graph finds
            self.request.infer([self.tensor(held.numpy())])
            return [torch.from_numpy(output.data.copy()) for output in self.request.output_tensors]
        # The outputs are new at each call: those of the last call must outlive the next.
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in self.shapes]
        self.request.set_input_tensor(self.tensor(held.numpy(), shared_memory=True))
        for i, output in enumerate(outputs):
            self.request.set_output_tensor(i, self.tensor(output.numpy(), shared_memory=True))
        self.request.infer(share_outputs=True)
        return outputs


def _read(core: Core, folder: Path) -> Model:
    try:
        graph = core.read_model(folder / GRAPH)
    except RuntimeError as error:
        raise UserError(
            f"{str(folder / GRAPH)!r} is no whole graph of OpenVINO: {last_line(error)}; make the stage again"
        ) from None
    for constant, _ in constants(graph):
        kind = constant.get_element_type().get_type_name()
        if kind in ("f16", "f32", "f64") and bool(_as_tensor(constant).isnan().any()):  # a mask may well be infinite
            raise UserError(
                f"{str(folder / GRAPH)!r}: {constant.get_friendly_name()!r} holds values that are no number"
            )
    return graph


def _as_tensor(constant: Node) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the memory is read-only, and nobody writes
        return torch.from_numpy(constant.data)


def constants(graph: Model) -> Iterator[tuple[Node, bool]]:
    """Every constant of a graph, and True for a weight: a factor or summand, not a scale, zero point or range."""
    for constant in graph.get_ordered_ops():
        if constant.get_type_name() == "Constant":
            coding = any(_is_coding(user, constant) for user in users(constant))
            yield constant, kind_of(constant) in BITS and not coding


def _is_coding(user: Node, constant: Node) -> bool:
    """True if `user` takes the constant as a range, a scale or a zero point of integers."""
    if user.get_type_name() == "FakeQuantize":
        return True
    if user.get_type_name() == "Convert":
        return any(_is_coding(after, user) for after in users(user))  # scales may be stored in float16
    if user.get_type_name() not in ("Multiply", "Subtract"):
        return False
    others = [v.get_source_output().get_node() for v in user.inputs()]
    if user.get_type_name() == "Subtract":
        others = others[:1]
    return any(o != constant and _is_unpacked(o) for o in others)  # (integers - zero point) * scale


def _is_unpacked(operation: Node) -> bool:
    """True if an operation turns stored integers into floats."""
    if operation.get_type_name() == "Subtract":
        return _is_unpacked(operation.input_value(0).get_node())  # less the zero point
    stored = operation.input_value(0).get_node() if operation.get_type_name() == "Convert" else None
    return stored is not None and (kind := kind_of(stored)) in BITS and kind[0] in "iu"


def users(operation: Node) -> list[Node]:
    """The operations that read an output of this operation."""
    return [target.get_node() for output in operation.outputs() for target in output.get_target_inputs()]
