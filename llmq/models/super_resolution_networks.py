"""The networks of the super-resolution papers. Each takes and gives `(n, channels, height, width)` on [0, 1].

Inside, all of them work on [-1, 1]; what a paper does instead (the mean colour of DIV2K taken off) differs by an
affine map that first and last layer absorb.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_shuffle, pixel_unshuffle

from llmq.data.degrade import phases


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps the size of its input."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def upsampler(channels: int, scale: int, slope: Any = None) -> list[nn.Module]:
    """Sub-pixel convolutions (Shi et al. 2016), one for 2 and 3, two for 4; after each what `slope` makes."""
    layers: list[nn.Module] = []
    for factor in (2, 2) if scale == 4 else (scale,):
        layers += [conv(channels, channels * factor**2), nn.PixelShuffle(factor)]
        layers += [slope()] if slope else []
    return layers


class Bicubic(nn.Module):  # type: ignore[misc]
    """Cubic interpolation (a = -0.5) by a whole factor, as `degrade.resize` does it, out of one convolution."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        kernels = torch.tensor(phases(scale), dtype=torch.float32)[:, None]
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each channel alone; the image is mirrored at its edges."""
        x = torch.cat([x[:, :, 1:2], x[:, :, :1], x, x[:, :, -1:], x[:, :, -2:-1]], 2)
        x = torch.cat([x[..., 1:2], x[..., :1], x, x[..., -1:], x[..., -2:-1]], 3)
        channels = x.shape[1]
        parts = conv2d(x, self.kernels.repeat(channels, 1, 1, 1), groups=channels)
        return pixel_shuffle(parts, self.scale)


class SrcnnNet(nn.Module):  # type: ignore[misc]
    """Bicubic upsampling, then patches, a non-linear map, and reconstruction (Dong et al. 2016)."""

    def __init__(self, channels: int, scale: int, middle: int) -> None:
        super().__init__()
        self.upsample = Bicubic(scale)
        self.patches = conv(channels, 64, 9)
        self.mapping = conv(64, 32, middle)
        self.reconstruction = conv(32, channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Three convolutions at the size of the output."""
        x = self.upsample(2 * x - 1)
        x = self.reconstruction(self.mapping(self.patches(x).relu()).relu())
        return x / 2 + 0.5


class _NormedBlock(nn.Module):  # type: ignore[misc]
    def __init__(self, features: int, slope: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(features, features),
            nn.BatchNorm2d(features),
            slope(),
            conv(features, features),
            nn.BatchNorm2d(features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SrResNetNet(nn.Module):  # type: ignore[misc]
    """The generator of SRGAN, trained without a discriminator (Ledig et al. 2017)."""

    def __init__(self, channels: int, scale: int, blocks: int, features: int, slope: Any) -> None:
        super().__init__()
        self.head = nn.Sequential(conv(channels, features, 9), slope())
        body = [_NormedBlock(features, slope) for _ in range(blocks)]
        self.body = nn.Sequential(*body, conv(features, features), nn.BatchNorm2d(features))
        self.tail = nn.Sequential(*upsampler(features, scale, slope), conv(features, channels, 9))

    def forward(self, x: Tensor) -> Tensor:
        """Residual blocks with batch normalization at the size of the input, one skip over all, then up."""
        x = self.head(2 * x - 1)
        return self.tail(x + self.body(x)) / 2 + 0.5


class _ScaledBlock(nn.Module):  # type: ignore[misc]
    def __init__(self, body: nn.Sequential, scale: float) -> None:
        super().__init__()
        self.body, self.scale = body, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.body(x) if self.scale == 1 else self.scale * self.body(x))


class EdsrNet(nn.Module):  # type: ignore[misc]
    """Residual blocks without normalization (Lim et al. 2017)."""

    def __init__(self, channels: int, scale: int, blocks: int, features: int, residual_scale: float) -> None:
        super().__init__()
        self.head = conv(channels, features)
        body: list[nn.Module] = [
            _ScaledBlock(nn.Sequential(conv(features, features), nn.ReLU(), conv(features, features)), residual_scale)
            for _ in range(blocks)
        ]
        self.body = nn.Sequential(*body, conv(features, features))
        self.tail = nn.Sequential(*upsampler(features, scale), conv(features, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Residual blocks at the size of the input, one skip over all, then up."""
        x = self.head(2 * x - 1)
        return self.tail(x + self.body(x)) / 2 + 0.5


class FoldedEdsr(nn.Module):  # type: ignore[misc]
    """The same function of images from 3 x 3 pixels on, its way up one convolution; the other layers are shared."""

    def __init__(self, network: EdsrNet) -> None:
        super().__init__()
        self.head, self.body = network.head, network.body
        self.tail = FoldedTail(network.tail)

    def forward(self, x: Tensor) -> Tensor:
        """As the network."""
        x = self.head(2 * x - 1)
        return self.tail(x + self.body(x))


class FoldedTail(nn.Module):  # type: ignore[misc]
    """The convolutions of a way up without activations, and from [-1, 1] to [0, 1], as one of 5x5 before a shuffle.

    Nothing bends between its convolutions, so what they do is linear: every output pixel is a sum over the 5x5
    features around it. At the border the zeros that each of them sees beyond it make other sums, of which there are
    eight: four edges and four corners, each one feature wide. At x4 the products become 29 times fewer.
    """

    def __init__(self, tail: nn.Sequential) -> None:
        super().__init__()
        self.scale = math.prod(layer.upscale_factor for layer in tail if isinstance(layer, nn.PixelShuffle))
        weights, biases = self._sums(tail)
        self.parts = nn.ModuleList()
        for i, (rows, beyond_rows) in enumerate(PARTS):
            for j, (columns, beyond_columns) in enumerate(PARTS):
                weight = weights[:, i, j, :, rows, columns].contiguous()
                outputs, features, *kernel = weight.shape
                part = nn.Conv2d(features, outputs, kernel, padding=(beyond_rows, beyond_columns))
                part.weight, part.bias = nn.Parameter(weight), nn.Parameter(biases[:, i, j].clone())
                self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        """The inside, framed by edges and corners."""
        parts = iter(self.parts)
        rows = [torch.cat([next(parts)(x[:, :, seen, beside]) for beside, _ in PARTS], 3) for seen, _ in PARTS]
        return pixel_shuffle(torch.cat(rows, 2), self.scale)

    def _sums(self, tail: nn.Sequential) -> tuple[Tensor, Tensor]:
        """Weights and biases of an image of 5 x 5 at its first, middle and last row and column: gradients are the sums.

        `(outputs, 3, 3, features, 5, 5)` and `(outputs, 3, 3)`, an output being one of `scale` x `scale` pixels.
        """
        features, outputs = tail[0].in_channels, 9 * tail[-1].out_channels * self.scale**2
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(outputs, features, 5, 5, dtype=torch.float64, requires_grad=True)
            made = copy.deepcopy(tail).cpu().double()(x) / 2 + 0.5
            flat = pixel_unshuffle(made, self.scale)[:, :, ::2, ::2].reshape(outputs, outputs)
            (weights,) = torch.autograd.grad(flat.diagonal().sum(), x)
        shape = -1, 3, 3
        return weights.reshape(*shape, features, 5, 5).float(), flat[0].detach().reshape(shape).float()


PARTS = ((slice(0, 3), 0), (slice(None), 1), (slice(-3, None), 0))
"""Of a side of the output the first, those between, and the last: what features they see, and zeros beyond each end."""


def wide(features: int, expansion: int) -> nn.Sequential:
    """The body of a WDSR-A block: wide before the activation, narrow after."""
    return nn.Sequential(conv(features, features * expansion), nn.ReLU(), conv(features * expansion, features))


def wide_low_rank(features: int, expansion: int) -> nn.Sequential:
    """The body of a WDSR-B block: wider still, its large convolution split into a 1x1 to 0.8 of the width and a 3x3."""
    rank = int(0.8 * features)
    layers = [conv(features, features * expansion, 1), nn.ReLU(), conv(features * expansion, rank, 1)]
    return nn.Sequential(*layers, conv(rank, features))


class WdsrNet(nn.Module):  # type: ignore[misc]
    """Wide activations (Yu et al. 2018): no convolution after the upsampling, and a 5x5 one beside the whole body."""

    def __init__(self, channels: int, scale: int, features: int, bodies: list[nn.Sequential], residual: float) -> None:
        super().__init__()
        self.head = conv(channels, features)
        self.body = nn.Sequential(*(_ScaledBlock(body, residual) for body in bodies))
        self.tail = nn.Sequential(conv(features, channels * scale**2), nn.PixelShuffle(scale))
        self.skip = nn.Sequential(conv(channels, channels * scale**2, 5), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        """Both ways up, added."""
        x = 2 * x - 1
        return (self.tail(self.body(self.head(x))) + self.skip(x)) / 2 + 0.5
