"""Bytes on disk and in memory, parameters, and non-zero parameters. Exact figures."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llmq.plugin import KindsOf
from llmq.types import Loaded, Measurement, Model, Task

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.sketch import Sketch, Work


class Size(Task):
    suits = KindsOf(Model)

    def foresee(self, stage: "Sketch") -> "Work":
        """Every parameter is read, packed ones unpacked one at a time."""
        from llmq.sketch import BYTES, Work

        largest = max((part.weights for part in stage.parts), default=0) * BYTES[stage.dtype]
        return Work(stage.in_memory + largest, {"copy": 12.0 * stage.parameters * BYTES[stage.dtype]})

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """Count on the files and on the opened module."""
        from llmq.statistics.figures import exact

        # Of each tensor: the weights, those that are not zero, the bits of each.
        counts = [(values.numel(), int(values.count_nonzero()), bits) for values, bits in dense_weights(loaded.module)]
        on_disk = loaded.artifact.bytes_on_disk
        parameters, nonzeros = sum(count for count, _, _ in counts), sum(left for _, left, _ in counts)
        # A GGUF file has fewer bits a weight than the module that it was opened as.
        share = on_disk * 8 / sum(count * bits for count, _, bits in counts) if loaded.artifact.is_gguf else 1.0
        saved = sum(max(0, int((count - left) * bits * share - count) // 8) for count, left, bits in counts)
        for metric, value, unit, convention in (
            ("bytes_on_disk", on_disk, "bytes", "files of the weights and of the adapter, if there is one; "
             "GGUF, or graph and constants, if exported"),
            ("bytes_in_memory", bytes_in_memory(loaded.module), "bytes", "parameters, buffers and scales of packed "
             "weights as opened, or a graph's constants; tied ones once"),
            ("parameters", parameters, "parameters", "as they multiply: a packed weight counts unpacked"),
            ("nonzeros", nonzeros, "parameters", "parameters whose value, unpacked, is not zero"),
            ("sparse_bytes", on_disk - saved, "bytes", "no file: the files' size if each tensor kept a bitmap and its "
             "non-zeros where that is less"),
        ):  # fmt: skip
            yield exact(self.name, metric, value, unit, "lower", convention)


def bytes_in_memory(module: "Module") -> int:
    """The bytes of the tensors of a module, each once; packed weights count as they were when opened."""
    from llmq.text.bnb_layers import bytes_in, tensors_of

    others = (t for layer in module.modules() if not hasattr(layer, "bytes_as_opened") for t in tensors_of(layer))
    return bytes_in(others) + sum(getattr(layer, "bytes_as_opened", 0) for layer in module.modules())


def dense_weights(module: "Module") -> "Iterator[tuple[Tensor, int]]":
    """The values of every parameter, packed ones unpacked one at a time, and the bits that a value is stored in."""
    from llmq.matrix.packed_linear import PackedLinear
    from llmq.text.bnb_layers import is_packed, weight_of

    seen: set[int] = set()
    layer: Any  # a packed layer keeps its own attributes
    for layer in module.modules():
        packed = None
        if isinstance(layer, PackedLinear):
            yield layer.weight, layer.bits
        elif hasattr(layer, "stored"):  # a weight in a graph
            yield layer.stored(), layer.bits
        elif is_packed(layer):
            packed = layer.weight
            yield weight_of(layer), 4 if hasattr(packed, "quant_state") else 8
        for parameter in layer.parameters(recurse=False):
            if parameter is not packed and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                yield parameter.data, parameter.element_size() * 8
