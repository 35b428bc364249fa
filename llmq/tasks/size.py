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
                sum(t.untyped_storage().nbytes() for t in unique(held(loaded.module))),
                "bytes",
                "lower",
                "parameters, buffers and scales of packed weights as allocated, or a graph's constants; tied ones once",
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


def held(module: Any) -> Iterator[Any]:
    """Every tensor that a module holds, those that bitsandbytes keeps beside its weights too."""
    yield from module.buffers()
    for layer in module.modules():
        yield from layer.parameters(recurse=False)
        weight, state = getattr(layer, "weight", None), getattr(layer, "state", None)
        yield from _tensors(getattr(weight, "quant_state", None))
        yield from _tensors(state)
        yield from _tensors(weight, ("CB", "SCB"))


def _tensors(holder: Any, names: Iterable[str] = ("absmax", "code", "offset", "CB", "SCB")) -> Iterator[Any]:
    import torch

    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    if getattr(holder, "state2", None) is not None:
        yield from _tensors(holder.state2)


def unique(tensors: Iterable[Any]) -> list[Any]:
    """One tensor for each piece of memory."""
    return list({t.untyped_storage().data_ptr(): t for t in tensors if t.numel()}.values())


def dense_weights(module: Any) -> Iterator[tuple[Any, int]]:
    """Every parameter with its values, packed ones unpacked one at a time, and the bits that a value is stored in."""
    from llmq.quantize.gptq_linear import PackedLinear

    seen: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            yield layer.weight, layer.bits
        for parameter in layer.parameters(recurse=False):
            if parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                yield _unpacked(parameter)


def _unpacked(parameter: Any) -> tuple[Any, int]:
    if getattr(parameter, "quant_state", None) is None:
        return parameter.data, parameter.element_size() * 8
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state), 4
