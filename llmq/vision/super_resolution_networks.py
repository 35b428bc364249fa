"""The networks of the super-resolution papers. Input and output are `(n, channels, height, width)` on [0, 1].

Inside, all networks work on [-1, 1]. Papers that subtract the mean colour of DIV2K instead differ by an affine map,
which the first and the last layer absorb. An exported graph holds the names of local variables: a new or renamed
variable changes the bytes of the graph.
"""

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_shuffle, pixel_unshuffle

from llmq.vision.degrade import phases


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution whose output has the height and width of the input."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def upsampler(channels: int, scale: int, slope: Callable[[], nn.Module] | None = None) -> list[nn.Module]:
    """Sub-pixel convolutions (Shi et al. 2016): one for 2 and 3, two for 4; `slope` makes the activation after each."""
    layers: list[nn.Module] = []
    for factor in (2, 2) if scale == 4 else (scale,):
        layers += [conv(channels, channels * factor**2), nn.PixelShuffle(factor)]  # (n, channels, …) again
        layers += [slope()] if slope else []
    return layers


class Bicubic(nn.Module):
    """Cubic interpolation (a = -0.5) by a whole factor as one convolution; the result is that of `degrade.resize`."""

    kernels: Tensor

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        kernels = torch.tensor(phases(scale), dtype=torch.float32)[:, None]  # (scale², 1, 5, 5)
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Interpolate each channel alone; the image is mirrored at the edges."""
        x = torch.cat([x[:, :, 1:2], x[:, :, :1], x, x[:, :, -1:], x[:, :, -2:-1]], 2)  # (n, channels, height + 4, …)
        x = torch.cat([x[..., 1:2], x[..., :1], x, x[..., -1:], x[..., -2:-1]], 3)  # (…, height + 4, width + 4)
        channels = x.shape[1]
        parts = conv2d(x, self.kernels.repeat(channels, 1, 1, 1), groups=channels)  # (n, channels * scale², …)
        return pixel_shuffle(parts, self.scale)


class SrcnnNet(nn.Module):
    """Bicubic upsampling, then patches, a non-linear map, and reconstruction (SRCNN, Dong et al. 2016)."""

    def __init__(self, channels: int, scale: int, middle: int) -> None:
        super().__init__()
        self.upsample = Bicubic(scale)
        self.patches = conv(channels, 64, 9)
        self.mapping = conv(64, 32, middle)
        self.reconstruction = conv(32, channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.upsample(2 * x - 1)  # at the size of the output from here on
        x = self.reconstruction(self.mapping(self.patches(x).relu()).relu())
        return x / 2 + 0.5


class _Residual(nn.Module):
    """Residual blocks at the size of the input, one skip over all blocks, then upsampling."""

    head: nn.Module
    body: nn.Module
    tail: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(2 * x - 1)  # (n, features, height, width)
        return cast(Tensor, self.tail(x + self.body(x))) / 2 + 0.5  # (n, channels, height * scale, width * scale)


class _Block(nn.Module):
    def __init__(self, body: nn.Sequential, scale: float = 1.0) -> None:
        super().__init__()
        self.body, self.scale = body, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.body(x) if self.scale == 1 else self.scale * self.body(x))


class SrResNetNet(_Residual):
    """The generator of SRGAN, trained without a discriminator (Ledig et al. 2017): blocks with batch normalization."""

    def __init__(self, channels: int, scale: int, blocks: int, features: int, slope: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.head = nn.Sequential(conv(channels, features, 9), slope())

        def normed() -> list[nn.Module]:
            return [conv(features, features), nn.BatchNorm2d(features)]

        body = [_Block(nn.Sequential(*normed(), slope(), *normed())) for _ in range(blocks)]
        self.body = nn.Sequential(*body, *normed())
        self.tail = nn.Sequential(*upsampler(features, scale, slope), conv(features, channels, 9))


class EdsrNet(_Residual):
    """Residual blocks without normalization (Lim et al. 2017)."""

    tail: nn.Sequential

    def __init__(self, channels: int, scale: int, blocks: int, features: int, residual_scale: float) -> None:
        super().__init__()
        self.head = conv(channels, features)
        body = [wide(features, 1, residual_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*body, conv(features, features))
        self.tail = nn.Sequential(*upsampler(features, scale), conv(features, channels))


class VolumeNet(_Residual):
    """EDSR of volumes `(n, channels, depth, height, width)`; one convolution makes all voxels that a voxel becomes."""

    def __init__(self, channels: int, scale: int, blocks: int, features: int, residual_scale: float) -> None:
        super().__init__()

        def conv3(inputs: int, outputs: int) -> nn.Conv3d:
            return nn.Conv3d(inputs, outputs, 3, padding=1)

        def block() -> nn.Module:
            return _Block(
                nn.Sequential(conv3(features, features), nn.ReLU(), conv3(features, features)), residual_scale
            )

        self.head = conv3(channels, features)
        self.body = nn.Sequential(*[block() for _ in range(blocks)], conv3(features, features))
        self.tail = nn.Sequential(conv3(features, channels * scale**3), VoxelShuffle(scale))


class VoxelShuffle(nn.Module):
    """PixelShuffle of volumes: `scale`³ channels at a voxel become the voxels of a cube."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        n, channels, depth, height, width = x.shape
        k = self.scale
        x = x.reshape(n, channels // k**3, k, k, k, depth, height, width).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(n, channels // k**3, depth * k, height * k, width * k)


class FoldedEdsr(nn.Module):
    """The function of an `EdsrNet` on images of at least 3 x 3 pixels; the tail is folded, head and body are shared."""

    def __init__(self, network: EdsrNet) -> None:
        super().__init__()
        self.head, self.body = network.head, network.body
        self.tail = FoldedTail(network.tail)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(2 * x - 1)  # (n, features, height, width)
        return cast(Tensor, self.tail(x + self.body(x)))  # the folded tail ends on [0, 1]


class FoldedTail(nn.Module):
    """An upsampling tail without activations, and the map from [-1, 1] to [0, 1], as one 5x5 convolution and a shuffle.

    Convolutions without activations are one linear map: every output pixel is a sum over the 5x5 features around it.
    At the border each convolution sees zeros, which makes eight other sums: four edges and four corners, each one
    feature wide. At x4 the multiplications become 29 times fewer.
    """

    def __init__(self, tail: nn.Sequential) -> None:
        super().__init__()
        self.scale = math.prod(layer.upscale_factor for layer in tail if isinstance(layer, nn.PixelShuffle))
        weights, biases = self._sums(tail)
        self.parts = nn.ModuleList()
        for i, (rows, beyond_rows) in enumerate(PARTS):
            for j, (columns, beyond_columns) in enumerate(PARTS):
                weight = weights[:, i, j, :, rows, columns].contiguous()  # (outputs, features, high, wide)
                outputs, features, high, wide = weight.shape
                part = nn.Conv2d(features, outputs, (high, wide), padding=(beyond_rows, beyond_columns))
                part.weight, part.bias = nn.Parameter(weight), nn.Parameter(biases[:, i, j].clone())
                self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        """The inside, with edges and corners around it."""
        parts = iter(self.parts)
        rows = [torch.cat([next(parts)(x[:, :, seen, beside]) for beside, _ in PARTS], 3) for seen, _ in PARTS]
        return pixel_shuffle(torch.cat(rows, 2), self.scale)  # of (n, outputs, height, width)

    def _sums(self, tail: nn.Sequential) -> tuple[Tensor, Tensor]:
        """The weights and biases at the first, middle and last row and column of a 5 x 5 image, read off as gradients.

        An output is one of the `scale` x `scale` pixels of a channel.
        """
        convolutions = [layer for layer in tail if isinstance(layer, nn.Conv2d)]
        features, outputs = convolutions[0].in_channels, 9 * convolutions[-1].out_channels * self.scale**2
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(outputs, features, 5, 5, dtype=torch.float64, requires_grad=True)  # one image an output
            made = copy.deepcopy(tail).cpu().double()(x) / 2 + 0.5
            flat = pixel_unshuffle(made, self.scale)[:, :, ::2, ::2].reshape(outputs, outputs)  # rows 0, 2 and 4
            (weights,) = torch.autograd.grad(flat.diagonal().sum(), x)  # image i: the weights of output i
        weights = weights.reshape(-1, 3, 3, features, 5, 5).float()  # (outputs, 3, 3, features, 5, 5)
        return weights, flat[0].detach().reshape(-1, 3, 3).float()  # (outputs, 3, 3)


PARTS = ((slice(0, 3), 0), (slice(None), 1), (slice(-3, None), 0))
"""The features seen, and the zeros beyond each end, for the first place of a side, the places between, and the last."""


def wide(features: int, expansion: int, scale: float) -> nn.Module:
    """A WDSR-A block: wide before the activation, narrow after. With `expansion` 1 it is the block of EDSR."""
    inner = features * expansion
    return _Block(nn.Sequential(conv(features, inner), nn.ReLU(), conv(inner, features)), scale)


def wide_low_rank(features: int, expansion: int, scale: float) -> nn.Module:
    """A WDSR-B block: wider still; the large convolution is split into a 1x1 to 0.8 of the features and a 3x3."""
    rank, inner = int(0.8 * features), features * expansion
    layers = [conv(features, inner, 1), nn.ReLU(), conv(inner, rank, 1), conv(rank, features)]
    return _Block(nn.Sequential(*layers), scale)


class WdsrNet(nn.Module):
    """Wide activations (Yu et al. 2018): no convolution after the upsampling, and a 5x5 one beside the whole body."""

    def __init__(self, channels: int, scale: int, features: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.head = conv(channels, features)
        self.body = nn.Sequential(*blocks)
        self.tail = nn.Sequential(conv(features, channels * scale**2), nn.PixelShuffle(scale))
        self.skip = nn.Sequential(conv(channels, channels * scale**2, 5), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        return cast(Tensor, self.tail(self.body(self.head(x))) + self.skip(x)) / 2 + 0.5  # both ways up, added
