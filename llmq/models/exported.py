"""An exported graph that is called like the torch module it was made from, run by OpenVINO on the processor."""

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.environment import library_version
from llmq.errors import LlmqError, UserError
from llmq.models.runtime import GRAPH, core, openvino, options

PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
SHAPES = 9
"""How many input shapes stay compiled: as many as the tiles of one image have. A static graph is up to a third faster
than one for all shapes, and takes a fifth of a second to compile."""


class ExportedModule(nn.Module):  # type: ignore[misc]
    """The graph in a folder's `model.xml`: one float tensor in, a tensor or a tuple of tensors out.

    It is compiled for each shape of input that comes, for as many threads as torch has then. Weights are parameters,
    and what says how their integers are coded are buffers; both lie in the graph's own memory: do not write to them.
    """

    def __init__(self, graph: Any):
        """Of a folder, or of a graph in memory."""
        super().__init__()
        self.core = core()
        self.graph = _read(self.core, graph) if isinstance(graph, Path) else graph
        self.options = options(self.core, self.graph)
        precision = self.options["INFERENCE_PRECISION_HINT"]
        self.precision = PRECISIONS.get(precision, precision)
        self.compiled: OrderedDict[tuple[Any, int], _Compiled] = OrderedDict()
        weights: list[Tensor] = []
        others: list[Tensor] = []
        for constant, is_weight in constants(self.graph):
            (weights if is_weight else others).append(_as_tensor(constant))
        self.weights = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in weights)
        for i, tensor in enumerate(others):
            self.register_buffer(f"constant_{i}", tensor)
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the graph makes of an input; the outputs are the caller's own memory, on the device of the input."""
        held = inputs.detach().to("cpu", torch.float32).contiguous()
        outputs = self._for(tuple(held.shape))(held)
        if inputs.device.type != "cpu":
            outputs = [t.to(inputs.device) for t in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _for(self, shape: tuple[int, ...]) -> "_Compiled":
        key = shape, torch.get_num_threads()
        if key not in self.compiled:
            wanted = self.graph.input(0).partial_shape
            if not wanted.compatible(openvino().PartialShape(list(shape))):
                raise LlmqError(f"the exported graph takes inputs of {wanted}, and this one is {list(shape)}")
            if len(self.compiled) == SHAPES:
                self.compiled.popitem(last=False)
            graph = self.graph.clone()
            try:
                graph.reshape(list(shape))
            except RuntimeError as error:  # such as an image smaller than a kernel
                why = str(error).strip().splitlines()[-1]
                raise LlmqError(f"the exported graph takes no input {list(shape)}: {why}") from None
            threads = {"INFERENCE_NUM_THREADS": key[1]}
            try:
                self.compiled[key] = _Compiled(self.core.compile_model(graph, "CPU", {**self.options, **threads}))
            except RuntimeError as error:
                why = str(error).strip().splitlines()[-1]
                raise LlmqError(
                    f"OpenVINO {library_version('openvino')} cannot compile the exported graph for an input "
                    f"{list(shape)}: {why}; make the stage by another step, or take another version of OpenVINO"
                ) from None
        self.compiled.move_to_end(key)
        return self.compiled[key]


class _Compiled:
    """A graph compiled for one shape, with neither input nor outputs copied."""

    def __init__(self, compiled: Any):
        self.tensor = openvino().Tensor
        self.request = compiled.create_infer_request()
        self.shapes = [(tuple(o.shape), getattr(torch, o.element_type.to_dtype().name)) for o in compiled.outputs]

    def __call__(self, held: Tensor) -> list[Tensor]:
        # The outputs are new at each call: what the graph gave the last time must outlive the next.
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in self.shapes]
        self.request.set_input_tensor(self.tensor(held.numpy(), shared_memory=True))
        for i, output in enumerate(outputs):
            self.request.set_output_tensor(i, self.tensor(output.numpy(), shared_memory=True))
        self.request.infer(share_outputs=True)
        return outputs


def _read(core: Any, folder: Path) -> Any:
    try:
        graph = core.read_model(folder / GRAPH)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1]
        raise UserError(f"{str(folder / GRAPH)!r} is no whole graph of OpenVINO: {why}; make the stage again") from None
    for constant, _ in constants(graph):
        kind = constant.get_element_type().get_type_name()
        if kind in ("f16", "f32", "f64") and bool(_as_tensor(constant).isnan().any()):  # a mask may well be infinite
            raise UserError(
                f"{str(folder / GRAPH)!r}: {constant.get_friendly_name()!r} holds values that are no number"
            )
    return graph


BITS = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16, "boolean": 8, "i4": 4, "u4": 4, "u1": 1}
BITS |= {f"{sign}{bits}": bits for sign in "iu" for bits in (8, 16, 32, 64)}
"""How many bits one number of a constant takes, by OpenVINO's names of dtypes."""


def check_graph(folder: Path) -> None:
    """Raise `UserError` unless a folder's graph is whole and its constants lie inside the file beside it.

    OpenVINO maps that file into memory: one that was cut ends the process.
    """
    from xml.etree import ElementTree

    file, constants_file = folder / GRAPH, (folder / GRAPH).with_suffix(".bin")
    for needed in (file, constants_file):
        if not needed.is_file():
            raise UserError(f"{str(folder)!r} lacks {needed.name!r}; make the stage again")
    try:
        root = ElementTree.parse(file).getroot()
        layers = [
            (layer, data) for layer in root.iter("layer") for data in layer.iter("data") if "offset" in data.attrib
        ]
        ends = {str(layer.get("name")): _end(data.attrib) for layer, data in layers}
    except (ElementTree.ParseError, ValueError, KeyError, UnicodeError) as error:
        raise UserError(f"{str(file)!r} is no whole graph of OpenVINO: {error}; make the stage again") from None
    if root.tag != "net" or not ends:
        raise UserError(f"{str(file)!r} is no graph of OpenVINO with constants; make the stage again")
    size, end = constants_file.stat().st_size, max(ends.values())
    if end != size:
        cut = [name for name, its in ends.items() if its > size]
        told = f"; {len(cut)} constants lie beyond its end, first {cut[0]!r}" if cut else ""
        raise UserError(f"{str(constants_file)!r} has {size} bytes, and its graph tells of {end}{told}")


def _end(data: Mapping[str, str]) -> int:
    """Where a constant ends in the file. Raises `ValueError` for a size that its shape does not have."""
    offset, size = int(data["offset"]), int(data["size"])
    bits = BITS.get(data["element_type"])
    numbers = math.prod(int(n) for n in data["shape"].split(",") if n.strip())
    if min(offset, size) < 0 or (bits and size != -(-numbers * bits // 8)):
        raise ValueError(f"a constant {data['element_type']} of shape {data['shape']!r} has {size} bytes")
    return offset + size


def _as_tensor(constant: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to; nobody does
        return torch.from_numpy(constant.data)


def constants(graph: Any) -> Iterator[tuple[Any, bool]]:
    """Every constant of a graph, and whether it is a weight: a number that multiplies or is added, not its coding."""
    for operation in graph.get_ordered_ops():
        if operation.get_type_name() == "Constant":
            yield operation, _is_weight(operation)


def _is_weight(constant: Any) -> bool:
    kind = constant.get_element_type().get_type_name()
    return kind in ("f32", "f16", "i8") and not any(_is_coding(user, constant) for user in users(constant))


def _is_coding(user: Any, constant: Any) -> bool:
    """Whether `user` takes the constant for a range, a scale or a zero point of integers."""
    if user.get_type_name() == "FakeQuantize":
        return True
    if user.get_type_name() == "Convert":
        return any(_is_coding(after, user) for after in users(user))
    if user.get_type_name() not in ("Multiply", "Subtract"):
        return False
    others = [v.get_source_output().get_node() for v in user.inputs()]
    return any(o != constant and is_unpacked(o) for o in others)


def is_unpacked(operation: Any) -> bool:
    """Whether an operation turns integers that are stored into floats."""
    if operation.get_type_name() == "Subtract":
        return is_unpacked(operation.input_value(0).get_node())
    stored = operation.input_value(0).get_node() if operation.get_type_name() == "Convert" else None
    return stored is not None and stored.get_element_type().get_type_name() in ("i8", "u8")


def users(operation: Any) -> list[Any]:
    """The operations that take what this one gives."""
    return [target.get_node() for output in operation.outputs() for target in output.get_target_inputs()]
