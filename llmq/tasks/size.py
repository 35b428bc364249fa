"""How large a model is."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from llmq.files import bytes_of
from llmq.models.vision import KINDS
from llmq.types import Better, Loaded, Measurement, Task


class Size(Task):
    """Bytes on disk and in memory, parameters, and how many of them are not zero. Exact figures."""

    suits: ClassVar[frozenset[str]] = KINDS | {"causal-lm"}

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """Counted on the files and on the opened module."""
        parameters = nonzeros = saved = 0
        for values, bits in dense_weights(loaded.module):
            left = int(values.count_nonzero())
            parameters += values.numel()
            nonzeros += left
            saved += max(0, (values.numel() * bits - values.numel() - left * bits) // 8)
        on_disk = bytes_of(loaded.artifact.weight_files())

        def exact(metric: str, value: int, unit: str, better: Better, convention: str) -> Measurement:
            return Measurement(self.name, metric, value, unit, better, 1, 0.0, convention, exact=True)

        return (
            exact(
                "bytes_on_disk",
                on_disk,
                "bytes",
                "lower",
                "safetensors files of the weights and of the adapter, if there is one; graph and constants if exported",
            ),
            exact(
                "bytes_in_memory",
                bytes_in_memory(loaded.module),
                "bytes",
                "lower",
                "parameters, buffers and scales of packed weights as opened, or a graph's constants; tied ones once",
            ),
            exact("parameters", parameters, "parameters", "lower", "as they multiply: a packed weight counts unpacked"),
            exact("nonzeros", nonzeros, "parameters", "lower", "parameters whose value, unpacked, is not zero"),
            exact(
                "sparse_bytes",
                on_disk - saved,
                "bytes",
                "lower",
                "no file: the files' size if each tensor kept a bitmap and its non-zeros where that is less",
            ),
        )


def bytes_in_memory(module: Any) -> int:
    """What a module holds, each piece once; packed weights as they were opened, whatever was asked of them since."""
    from llmq.quantize.bnb_layers import bytes_in, tensors_of

    others = (t for layer in module.modules() if not hasattr(layer, "bytes_as_opened") for t in tensors_of(layer))
    return bytes_in(others) + sum(getattr(layer, "bytes_as_opened", 0) for layer in module.modules())


def dense_weights(module: Any) -> Iterator[tuple[Any, int]]:
    """Every parameter with its values, packed ones unpacked one at a time, and the bits that a value is stored in."""
    from llmq.quantize.bnb_layers import is_packed, weight_of
    from llmq.quantize.gptq_linear import PackedLinear

    seen: set[int] = set()
    for layer in module.modules():
        packed = None
        if isinstance(layer, PackedLinear):
            yield layer.weight, layer.bits
        elif is_packed(layer):
            packed = layer.weight
            yield weight_of(layer), 4 if hasattr(packed, "quant_state") else 8
        for parameter in layer.parameters(recurse=False):
            if parameter is not packed and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                yield parameter.data, parameter.element_size() * 8
