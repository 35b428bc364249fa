"""Weight normalization (Salimans & Kingma 2016): put on a network, taken off, and put back."""

from typing import Any


def normalize(network: Any) -> Any:
    """`network`, every convolution's weight held as direction and length from now on; it computes the same."""
    import torch
    from torch.nn.utils.parametrizations import weight_norm

    for layer in list(network.modules()):
        if isinstance(layer, torch.nn.Conv2d):
            weight_norm(layer)
    return network


def without_weight_norm(network: Any) -> dict[str, int]:
    """Make normalized weights plain, in place; the dimension of the norm by the layer's name."""
    from torch.nn.utils import parametrize
    from torch.nn.utils.parametrizations import _WeightNorm

    taken: dict[str, int] = {}
    for name, layer in list(network.named_modules()):
        chain: Any = layer.parametrizations.weight if parametrize.is_parametrized(layer, "weight") else []
        if len(chain) == 1 and isinstance(chain[0], _WeightNorm):
            taken[name] = chain[0].dim
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return taken


def with_weight_norm(network: Any, dimensions: dict[str, int]) -> None:
    """Normalize weights, in place; they stay what they are."""
    from torch.nn.utils.parametrizations import weight_norm

    for name, dimension in dimensions.items():
        weight_norm(network.get_submodule(name), dim=dimension)
