"""The two networks of a DCGAN for 64x64 images (Radford et al. 2015, figure 1; names as in PyTorch's own example)."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 64


class Generator(nn.Module):  # type: ignore[misc]
    """Latents `(n, latent_size, 1, 1)` to images `(n, channels, 64, 64)` on [-1, 1]."""

    def __init__(self, latent_size: int, features: int, channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        sides = [latent_size, *(features * k for k in (8, 4, 2, 1))]
        for i, (inputs, outputs) in enumerate(pairwise(sides)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(features, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)
        self.apply(_begin)

    def forward(self, latents: Tensor) -> Tensor:
        """Images on [-1, 1]."""
        return self.main(latents)


class Discriminator(nn.Module):  # type: ignore[misc]
    """Images `(n, channels, 64, 64)` on [-1, 1] to the logits `(n,)` that they are real."""

    def __init__(self, features: int, channels: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for inputs in (features, features * 2, features * 4):
            layers += [nn.Conv2d(inputs, inputs * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(inputs * 2)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(features * 8, 1, 4, 1, 0, bias=False))
        self.apply(_begin)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; the sigmoid is in the loss, where it loses no precision."""
        return self.main(images).flatten()


def _begin(layer: nn.Module) -> None:
    """The paper's initialization: normal with standard deviation 0.02, around 1 for the scales of a batch norm."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


def discriminator_loss(discriminator: Any, real: Tensor, made: Tensor) -> Tensor:
    """Mean of -log D(real) and -log(1 - D(made)), in nats. The paper's: each batch is normalized by itself."""
    discriminator.requires_grad_(True)
    entropy = nn.functional.binary_cross_entropy_with_logits
    on_real, on_made = discriminator(real), discriminator(made)
    return (entropy(on_real, torch.ones_like(on_real)) + entropy(on_made, torch.zeros_like(on_made))) / 2


def generator_loss(discriminator: Any, made: Tensor) -> Tensor:
    """-log D(made) in nats: the loss that does not saturate (Goodfellow et al. 2014, section 3)."""
    discriminator.requires_grad_(False)  # its gradients would be thrown away
    on_made = discriminator(made)
    return nn.functional.binary_cross_entropy_with_logits(on_made, torch.ones_like(on_made))
