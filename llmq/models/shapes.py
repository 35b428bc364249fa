"""The shapes of a network's layers: taking channels out of them, writing down what is left, and making it so again."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmq.errors import UserError

Which = Literal["outputs", "inputs"]


@dataclass(frozen=True)
class Side:
    """The attributes that say how many channels a layer has on one side, and the dimension of each tensor over them."""

    attributes: tuple[str, ...]
    tensors: Mapping[str, int]


@dataclass(frozen=True)
class Kind:
    """The two sides of a kind of layer; one and the same where a channel goes straight through."""

    outputs: Side
    inputs: Side

    def side(self, which: Which) -> Side:
        """One of the two."""
        return self.outputs if which == "outputs" else self.inputs


def _through(attributes: tuple[str, ...], names: tuple[str, ...], dimension: int = 0) -> Kind:
    side = Side(attributes, dict.fromkeys(names, dimension))
    return Kind(side, side)


CONVOLUTION = Kind(Side(("out_channels",), {"weight": 0, "bias": 0}), Side(("in_channels",), {"weight": 1}))
TRANSPOSED = Kind(Side(("out_channels",), {"weight": 1, "bias": 0}), Side(("in_channels",), {"weight": 0}))
DEPTHWISE = _through(("in_channels", "out_channels", "groups"), ("weight", "bias"))
LINEAR = Kind(Side(("out_features",), {"weight": 0, "bias": 0}), Side(("in_features",), {"weight": 1}))
BATCH_NORM = _through(("num_features",), ("weight", "bias", "running_mean", "running_var"))
FROZEN_NORM = _through((), ("running_mean", "running_var", "weight", "bias"))
GROUP_NORM = _through(("num_channels",), ("weight", "bias"))
LAYER_NORM = _through(("normalized_shape",), ("weight", "bias"), -1)
PRELU = _through(("num_parameters",), ("weight",))


def kind_of(layer: Any) -> Kind | None:
    """The kind of a layer whose shape can change; None for any other module."""
    from torch import nn

    convolution = nn.modules.conv._ConvNd
    kinds = {
        nn.Linear: LINEAR,
        nn.modules.batchnorm._NormBase: BATCH_NORM,
        nn.GroupNorm: GROUP_NORM,
        nn.LayerNorm: LAYER_NORM,
        nn.PReLU: PRELU,
        convolution: TRANSPOSED if getattr(layer, "transposed", False) else CONVOLUTION,
    }
    if isinstance(layer, convolution) and 1 < layer.groups == layer.in_channels == layer.out_channels:
        return DEPTHWISE
    if getattr(layer, "_buffers", {}).keys() == FROZEN_NORM.outputs.tensors.keys() and not layer._parameters:
        return FROZEN_NORM  # a class of torchvision, and one each of several detectors of transformers
    return next((kind for cls, kind in kinds.items() if isinstance(layer, cls)), None)


def has_channels(layer: Any) -> bool:
    """Whether it is a layer with a size for its channels; a PReLU can have one slope for all."""
    return kind_of(layer) is not None and getattr(layer, "num_parameters", 0) != 1


def channels_of(layer: Any, which: Which) -> int:
    """How many channels a layer has on one side."""
    kind = kind_of(layer)
    assert kind is not None
    if kind is FROZEN_NORM:
        return len(layer.running_mean)
    count = getattr(layer, kind.side(which).attributes[0])
    return int(count[-1] if isinstance(count, tuple) else count)


def places(layer: Any, which: Which, channels: Collection[int]) -> dict[str, tuple[int, list[int]]]:
    """Dimension and indices of some channels of a layer in each tensor that it has.

    The weight of a grouped convolution holds the inputs of one group; there `channels` are the same in every group.
    """
    kind, count = kind_of(layer), channels_of(layer, which)
    assert kind is not None
    found = {}
    for name, dimension in kind.side(which).tensors.items():
        tensor = getattr(layer, name)
        if tensor is not None:
            length = tensor.shape[dimension]
            found[name] = dimension, [i for i in sorted(channels) if i < length]
            assert len(found[name][1]) * count == len(channels) * length, "every group loses the same channels"
    return found


def narrow(layer: Any, which: Which, gone: Collection[int]) -> None:
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
        old = getattr(layer, attribute)
        setattr(layer, attribute, (*old[:-1], len(kept)) if isinstance(old, tuple) else old - len(gone))


def _put(layer: Any, name: str, tensor: Any) -> None:
    """Put a tensor of another shape in the place of a parameter or buffer, `parametrizations.weight.original0` too."""
    import torch

    owner, _, leaf = name.rpartition(".")
    module = layer.get_submodule(owner)
    old = getattr(module, leaf)
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


def describe(network: Any) -> dict[str, dict[str, Any]]:
    """The sizes of every layer whose shape can change, as JSON holds them, by the layer's name."""
    found = {}
    for name, layer in network.named_modules():
        if (kind := kind_of(layer)) is not None:
            sizes = {a: getattr(layer, a) for a in (*kind.outputs.attributes, *kind.inputs.attributes)}
            if hasattr(layer, "groups"):
                sizes["groups"] = layer.groups
            tensors = {tensor: list(value.shape) for tensor, value in layer.state_dict().items()}
            plain = {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
            found[name] = {**plain, "tensors": tensors}
    return found


def changes(network: Any, fresh: Any) -> dict[str, dict[str, Any]]:
    """What `describe` says of the layers that differ from those of a fresh network of the same settings."""
    before = describe(fresh)
    return {name: its for name, its in describe(network).items() if its != before[name]}


def reshape(network: Any, description: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the layers of a fresh network the sizes of a description, new tensors being zero; noted as `reshaped`.

    Tensors whose shape stays are left alone: other layers may share them.

    Raises `UserError` for a description of another network.
    """
    layers = dict(network.named_modules())
    for name, its in description.items():
        tensors = {} if name not in layers else layers[name].state_dict()
        if name not in layers or set(tensors) != set(its["tensors"]):
            raise UserError(f"shapes.json tells of {name!r}, and the network of these settings has no such layer")
        for key, value in its.items():
            if key != "tensors":
                setattr(layers[name], key, tuple(value) if isinstance(value, list) else value)
        for tensor, shape in its["tensors"].items():
            if list(tensors[tensor].shape) != shape:
                _put(layers[name], tensor, tensors[tensor].new_zeros(shape))
    network.reshaped = dict(description)
