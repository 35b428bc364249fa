"""The two networks of a DCGAN (Radford et al. 2015, figure 1, for 64 pixels; names as in PyTorch's own example)."""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn


class Generator(nn.Module):
    """Latents `(n, latent_size, 1, 1)` to images `(n, channels, size, size)` on [-1, 1]."""

    def __init__(self, latent_size: int, features: int, channels: int, size: int = 64):
        super().__init__()
        layers: list[nn.Module] = []
        sides = [latent_size, *reversed(widths(features, size))]  # numbers of channels
        for i, (inputs, outputs) in enumerate(pairwise(sides)):
            stride, padding = (1, 0) if i == 0 else (2, 1)  # 4 x 4 pixels, then 8, 16, …
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(features, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)
        self.apply(_begin)

    def forward(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.main(latents))


class Discriminator(nn.Module):
    """Images `(n, channels, size, size)` on [-1, 1] to the logits `(n,)` that they are real."""

    def __init__(self, features: int, channels: int, size: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for inputs, outputs in pairwise(widths(features, size)):  # halved at each, to 4 x 4 pixels
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths(features, size)[-1], 1, 4, 1, 0, bias=False))
        self.apply(_begin)

    def forward(self, images: Tensor) -> Tensor:
        # (n, 1, 1, 1); the sigmoid is in the loss, where it loses no precision
        return cast(Tensor, self.main(images)).flatten()


def widths(features: int, size: int) -> list[int]:
    """The channels from the layer of size / 2 pixels to that of 4: each half has twice as many."""
    return [features * 2**i for i in range((size // 8).bit_length())]


def _begin(layer: nn.Module) -> None:
    """The paper's initialization: normal with standard deviation 0.02, around 1 for the scales of a batch norm."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


def discriminator_loss(discriminator: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """Mean of -log D(real) and -log(1 - D(made)), in nats. As in the paper, each batch is normalized by itself."""
    discriminator.requires_grad_(True)
    entropy = nn.functional.binary_cross_entropy_with_logits
    on_real, on_made = discriminator(real), discriminator(made)
    return (entropy(on_real, torch.ones_like(on_real)) + entropy(on_made, torch.zeros_like(on_made))) / 2


def generator_loss(discriminator: nn.Module, made: Tensor) -> Tensor:
    """-log D(made) in nats: the loss that does not saturate (Goodfellow et al. 2014, section 3)."""
    discriminator.requires_grad_(False)  # nobody reads gradients of the discriminator here
    on_made = discriminator(made)
    return nn.functional.binary_cross_entropy_with_logits(on_made, torch.ones_like(on_made))
