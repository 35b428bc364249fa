"""The shapes of a network's layers: taking channels out, describing the rest, and building the described shapes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Which = Literal["outputs", "inputs"]
Description = Mapping[str, Mapping[str, Any]]
"""The sizes of layers by name, and under `tensors` the shapes of their tensors."""


@dataclass(frozen=True)
class Side:
    """One side of a kind of layer: the attributes that count channels, and the dimension of channels in each tensor."""

    attributes: tuple[str, ...]
    tensors: Mapping[str, int]


@dataclass(frozen=True)
class Kind:
    """The two sides of a kind of layer; both are one object where a channel goes straight through."""

    outputs: Side
    inputs: Side

    def side(self, which: Which) -> Side:
        return self.outputs if which == "outputs" else self.inputs


def _through(attributes: tuple[str, ...], names: tuple[str, ...], dimension: int = 0) -> Kind:
    side = Side(attributes, dict.fromkeys(names, dimension))
    return Kind(side, side)


# Weights are (outputs, inputs, …) in a convolution and a linear layer, (inputs, outputs, …) in a transposed one.
CONVOLUTION = Kind(Side(("out_channels",), {"weight": 0, "bias": 0}), Side(("in_channels",), {"weight": 1}))
TRANSPOSED = Kind(Side(("out_channels",), {"weight": 1, "bias": 0}), Side(("in_channels",), {"weight": 0}))
DEPTHWISE = _through(("in_channels", "out_channels", "groups"), ("weight", "bias"))  # weight (channels, 1, …)
LINEAR = Kind(Side(("out_features",), {"weight": 0, "bias": 0}), Side(("in_features",), {"weight": 1}))
BATCH_NORM = _through(("num_features",), ("weight", "bias", "running_mean", "running_var"))
FROZEN_NORM = _through((), ("running_mean", "running_var", "weight", "bias"))  # buffers alone, and no count
GROUP_NORM = _through(("num_channels",), ("weight", "bias"))
LAYER_NORM = _through(("normalized_shape",), ("weight", "bias"), -1)  # channels come last
PRELU = _through(("num_parameters",), ("weight",))  # one slope a channel


def kind_of(layer: "Module | Tensor") -> Kind | None:
    """The kind of a layer whose shape can change; None for any other module, or a parameter that is no layer's."""
    from torch import nn

    if isinstance(layer, nn.modules.conv._ConvNd):
        if 1 < layer.groups == layer.in_channels == layer.out_channels:
            return DEPTHWISE
        return TRANSPOSED if layer.transposed else CONVOLUTION
    own_buffers = layer._buffers.keys() if isinstance(layer, nn.Module) and not layer._parameters else ()
    if own_buffers == FROZEN_NORM.outputs.tensors.keys():
        return FROZEN_NORM  # a class of torchvision, and one each of several detectors of transformers
    kinds: dict[type[nn.Module], Kind] = {
        nn.Linear: LINEAR,
        nn.modules.batchnorm._NormBase: BATCH_NORM,
        nn.GroupNorm: GROUP_NORM,
        nn.LayerNorm: LAYER_NORM,
        nn.PReLU: PRELU,
    }
    return next((kind for cls, kind in kinds.items() if isinstance(layer, cls)), None)


def has_channels(layer: "Module") -> bool:
    """True for a layer whose shape depends on its channels; a PReLU can have one slope for all."""
    return kind_of(layer) is not None and getattr(layer, "num_parameters", 0) != 1


def channels_of(layer: "Module", which: Which) -> int:
    """The number of channels of a layer on one side."""
    kind = kind_of(layer)
    assert kind is not None
    if kind is FROZEN_NORM:
        return len(layer.get_buffer("running_mean"))
    count = getattr(layer, kind.side(which).attributes[0])
    return int(count[-1] if isinstance(count, tuple) else count)


def places(layer: "Module", which: Which, channels: Collection[int]) -> dict[str, tuple[int, list[int]]]:
    """The dimension and the indices of `channels` in each tensor of a layer.

    The weight of a grouped convolution holds the inputs of one group; `channels` must be the same in every group.
    """
    kind, count = kind_of(layer), channels_of(layer, which)
    assert kind is not None
    found = {}
    for name, dimension in kind.side(which).tensors.items():
        tensor = getattr(layer, name)
        if tensor is not None:
            length = tensor.shape[dimension]
            found[name] = dimension, [i for i in sorted(channels) if i < length]  # the first group stands for all
            assert len(found[name][1]) * count == len(channels) * length, "every group loses the same channels"
    return found


def narrow(layer: "Module", which: Which, gone: Collection[int]) -> None:
    """Take channels out of one side of a layer, in place."""
    import torch

    kind, count = kind_of(layer), channels_of(layer, which)
    assert kind is not None
    kept = [i for i in range(count) if i not in gone]
    for name, (dimension, indices) in places(layer, which, kept).items():
        tensor = getattr(layer, name)
        left = tensor.detach().index_select(dimension, torch.tensor(indices, dtype=torch.long, device=tensor.device))
        _put(layer, name, left)
    for attribute in kind.side(which).attributes:
        old = getattr(layer, attribute)  # a tuple in LayerNorm
        setattr(layer, attribute, (*old[:-1], len(kept)) if isinstance(old, tuple) else old - len(gone))


def _put(layer: "Module", name: str, tensor: "Tensor") -> None:
    """Replace a parameter or buffer by a tensor of another shape; `name` may lead into `parametrizations`."""
    import torch

    owner, _, leaf = name.rpartition(".")
    module = layer.get_submodule(owner)
    if leaf in module._parameters:
        old = module.get_parameter(leaf)  # a frozen one stays frozen
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


def describe(network: "Module") -> Description:
    """The sizes of every layer whose shape can change, by the name of the layer, in types that JSON has."""
    layers = {}
    for name, layer in network.named_modules():
        if (kind := kind_of(layer)) is not None:
            sizes = {a: getattr(layer, a) for a in (*kind.outputs.attributes, *kind.inputs.attributes)}
            if hasattr(layer, "groups"):
                sizes["groups"] = layer.groups
            tensors = {tensor: list(value.shape) for tensor, value in layer.state_dict().items()}
            plain = {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
            layers[name] = {**plain, "tensors": tensors}
    return layers


def changes(network: "Module", fresh: "Module") -> Description:
    """The description of each layer that differs from the layer of a fresh network of the same settings."""
    before = describe(fresh)
    return {name: sizes for name, sizes in describe(network).items() if sizes != before[name]}


def reshape(network: "Module", description: Description) -> None:
    """Give the layers of a fresh network the sizes of a description, and keep the description as `network.reshaped`.

    New tensors are zero. Tensors whose shape stays are left alone: other layers may share them. Raises `UserError` for
    a description of another network.
    """
    layers = dict(network.named_modules())
    for name, sizes in description.items():
        tensors = layers[name].state_dict() if name in layers else {}
        if name not in layers or set(tensors) != set(sizes["tensors"]):
            raise UserError(f"shapes.json tells of {name!r}, and the network of these settings has no such layer")
        for key, value in sizes.items():
            if key != "tensors":
                setattr(layers[name], key, tuple(value) if isinstance(value, list) else value)
        for tensor, shape in sizes["tensors"].items():
            if list(tensors[tensor].shape) != shape:
                _put(layers[name], tensor, tensors[tensor].new_zeros(shape))  # the file fills it
    network.reshaped = dict(description)  # type: ignore[assignment]


def without_weight_norm(network: "Module") -> dict[str, int]:
    """Turn weights that are held as length and direction (Salimans & Kingma 2016) into plain ones, in place.

    Returns the dimension of each norm by the name of the layer.
    """
    from torch.nn.utils import parametrize
    from torch.nn.utils.parametrizations import _WeightNorm

    dimensions: dict[str, int] = {}
    for name, layer in list(network.named_modules()):
        chain: Any = layer.parametrizations.weight if parametrize.is_parametrized(layer, "weight") else []
        if len(chain) == 1 and isinstance(chain[0], _WeightNorm):
            dimensions[name] = chain[0].dim
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return dimensions


def with_weight_norm(network: "Module", dimensions: Mapping[str, int]) -> None:
    """Hold the weights of layers as length and direction, in place; their values stay."""
    from torch.nn.utils.parametrizations import weight_norm

    for name, dimension in dimensions.items():
        weight_norm(network.get_submodule(name), dim=dimension)
