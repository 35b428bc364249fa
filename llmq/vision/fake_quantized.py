"""A network that rounds as the integers of a graph will, while its float weights learn: NNCF's fake quantization."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from llmq.errors import LlmqError, UserError, did_you_mean
from llmq.openvino_runtime import openvino, quietly
from llmq.vision import apart
from llmq.vision.exported import ExportedModule
from llmq.vision.exporting import nncf, outputs
from llmq.vision.graph_layers import restore_names
from llmq.vision.likeness import Likeness

if TYPE_CHECKING:
    from nncf.torch.quantization.layers import BaseQuantizer
    from openvino import Model as Graph

    from llmq.vision.family import ImageModel

CLOSE = 0.1
"""The largest relative error of the graph of integers from the network that learned: single values round otherwise."""


def rounding(
    network: Module, inputs: Sequence[Tensor], bits: int, preset: str, ignored: Sequence[str], transformer: bool = False
) -> Module:
    """A copy of a network whose weights (`bits`) and activations (8 bits) are rounded, ranges those of `inputs`."""
    library = nncf()
    _without_compiler()
    if odd := next((name for name in ignored if not any(_within(n, name) for n, _ in network.named_modules())), None):
        names = [name for name, _ in network.named_modules()]
        raise UserError(f"ignored: the network has no layer {odd!r}{did_you_mean(odd, names)}")
    # NNCF names an operation after its module: blocks/0/conv/conv2d/0.
    patterns = [f"{re.escape(name.replace('.', '/'))}/.*" for name in ignored]
    fix = library.OverflowFix.FIRST_LAYER if bits == 8 else library.OverflowFix.DISABLE  # four bits overflow nowhere
    advanced = library.AdvancedQuantizationParameters(overflow_fix=fix)
    with quietly():
        made: Module = library.quantize(
            network.eval(),
            library.Dataset(list(inputs)),
            preset=library.QuantizationPreset(preset),
            subset_size=len(inputs),
            fast_bias_correction=True,  # the other one is for graphs alone
            model_type=library.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=library.IgnoredScope(patterns=patterns, validate=False) if patterns else None,
            advanced_parameters=advanced,
        )
    if bits != 8:  # NNCF itself gives no other number of bits than its hardware tables have
        for name, quantizer in _quantizers(made):
            if _is_of_weights(name, quantizer):
                quantizer.num_bits = bits  # over the same range
    return made


def _within(name: str, beginning: str) -> bool:
    return f"{name}.".startswith(f"{beginning}.")


def _without_compiler() -> None:
    """Let NNCF round by plain operations of torch.

    Else it compiles C++ at first use, or without a compiler asks torch.compile, which takes a minute: machines differ.
    """
    from nncf.torch.quantization import extensions
    from nncf.torch.quantization.reference import torch_executor

    plain = SimpleNamespace(Quantize_forward=torch_executor.forward, Quantize_backward=torch_executor.backward)
    for name in ("QuantizedFunctionsCPU", "QuantizedFunctionsCUDA"):
        namespace = getattr(extensions, name)
        if "_loaded_namespace" in vars(namespace):  # without a card there is a stand-in that only raises
            namespace._loaded_namespace = plain


def graph_of(network: Module, model: ImageModel) -> Graph:
    """The graph of integers of a network that `rounding` made and that learned. Raises `LlmqError` if they differ."""
    library = openvino()
    example = model.example(1)
    network = network.eval().cpu()
    with torch.inference_mode():
        truth = network(model.example(2))
    stripped = _stripped(network)
    with quietly():
        graph: Graph = library.convert_model(stripped, example_input=example)
        graph.reshape([-1, example.shape[1], *((-1, -1) if model.any_size else example.shape[2:])])
    restore_names(graph, stripped, _rounded_weights(stripped))
    apart.check_runs(graph, model.title, [example])
    made = ExportedModule(graph)
    for i, pair in enumerate(zip(*outputs(model, _Said(truth), made, model.example(2)), strict=True)):
        likeness = Likeness()
        likeness.add(*pair)
        if not likeness.relative_error <= CLOSE:
            raise LlmqError(
                f"{model.title} was exported wrongly: output {i} of the graph of integers is off by "
                f"{likeness.relative_error:.2g} of the network that learned"
            )
    return graph


class _Said(Module):
    """A module that was asked already."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer


def _quantizers(network: Module) -> list[tuple[str, BaseQuantizer]]:
    """NNCF's rounding modules and their names in the storage of hooks."""
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.quantization.layers import BaseQuantizer

    return [(name, hook) for name, hook in get_hook_storage(network).named_hooks() if isinstance(hook, BaseQuantizer)]


def _is_of_weights(name: str, quantizer: BaseQuantizer) -> bool:
    """True for the rounding of a weight: before an operation, in a range for each output channel.

    What a depthwise layer takes has a range for each channel, too, and is rounded behind the operation that made it.
    """
    return bool(quantizer.per_channel) and name.startswith("pre_hooks.")


class Rounded(Module):
    """One of NNCF's rounding modules by torch's own operation, which OpenVINO converts.

    NNCF's `strip` does so for 8 bits alone, and needs torchao.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: BaseQuantizer) -> None:
        super().__init__()
        _, _, scale, zero_point = quantizer.get_parameters_for_torch_fq()
        self.low, self.high = quantizer.level_low, quantizer.level_high
        self.axis = max(range(len(quantizer.scale_shape)), key=lambda i: quantizer.scale_shape[i])
        self.per_channel = quantizer.per_channel
        self.register_buffer("scale", scale.float() if self.per_channel else scale.float().squeeze())
        self.register_buffer("zero_point", zero_point.int() if self.per_channel else zero_point.int().squeeze())

    def forward(self, x: Tensor) -> Tensor:
        if not self.per_channel:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.low, self.high)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, self.low, self.high)


def _rounded_weights(stripped: Module) -> dict[str, Tensor]:
    """The weight of each layer as its rounding makes it, by the name of the layer."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    layers, found = dict(stripped.named_modules()), {}
    for name, hook in get_hook_storage(stripped).named_hooks():
        # pre_hooks.layer1/0/conv1/conv2d/0__1.0: an input of the first conv2d of layer1.0.conv1
        layer = name.removeprefix("pre_hooks.").rsplit("/", 2)[0].replace("/", ".")
        weight = getattr(layers.get(layer), "weight", None)
        if isinstance(hook, Rounded) and hook.per_channel and isinstance(weight, Tensor):
            found[layer] = hook(weight.detach())
    return found


def _stripped(network: Module) -> Module:
    """The network with torch's own rounding in place of NNCF's."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    for name, quantizer in _quantizers(network):
        quantizer.set_levels()
        with torch.no_grad():
            get_hook_storage(network).set_submodule(name, Rounded(quantizer))
    return network
