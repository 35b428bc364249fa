"""The Inception network that FID is defined by: TensorFlow's of 2015-12-05, on torchvision's blocks.

The network differs from torchvision's Inception v3 in pooling: averages leave the padding out, and the last block takes
a maximum. The weights are a file of others, `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid or
`weights-inception-2015-12-05-6726825d.pth` of torch-fidelity.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torchvision.models import inception

SIZE = 299
CLASSES = 1008


class _OtherPool(nn.Module):
    """A mixin for blocks of torchvision that feeds the last branch from another pooling."""

    pool = staticmethod(partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False))

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(self.pool(x))]  # type: ignore[misc, operator]


class _A(_OtherPool, inception.InceptionA):  # type: ignore[misc]
    pass


class _C(_OtherPool, inception.InceptionC):  # type: ignore[misc]
    pass


class _E(_OtherPool, inception.InceptionE):  # type: ignore[misc]
    pass


class _Last(_OtherPool, inception.InceptionE):  # type: ignore[misc]
    pool = staticmethod(partial(max_pool2d, kernel_size=3, stride=1, padding=1))


def fid_inception() -> inception.Inception3:
    """The network with random weights: images `(n, 3, 299, 299)`, (pixel - 128) / 128, to 1008 logits."""
    blocks = [inception.BasicConv2d, _A, inception.InceptionB, _C, inception.InceptionD, _E, inception.InceptionAux]
    network = inception.Inception3(CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
    network.Mixed_7c = _Last(2048)
    return network


def resized(images: Tensor, size: int = SIZE) -> Tensor:
    """Images `(n, c, h, w)` scaled as TensorFlow 1 does: bilinear, pixel i of the result being at i * h / size."""
    rows, columns = (_weights(side, size).to(images) for side in images.shape[2:])
    return rows @ images @ columns.T  # (n, c, size, size)


def _weights(side: int, size: int) -> Tensor:
    at = torch.arange(size, dtype=torch.float64) * side / size
    low = at.floor().long()
    high = (low + 1).clamp(max=side - 1)
    weights = torch.zeros(size, side, dtype=torch.float64)  # a row for each pixel of the result
    weights.scatter_add_(1, low[:, None], (1 - at + low)[:, None])
    return weights.scatter_add_(1, high[:, None], (at - low)[:, None])
