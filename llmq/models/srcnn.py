"""SRCNN (Dong et al. 2016): three convolutions over the bicubic image.

At one channel the kernels 9-1-5 have 8,129 parameters, and 9-5-5, the best of the paper, 57,281. The convolutions work
at the size of the output: the network is small on disk, and slow for its size.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmq.vision.super_resolution import SuperResolution

if TYPE_CHECKING:
    from torch.nn import Module


class Srcnn(SuperResolution):
    kernel: Literal[1, 3, 5] = Field(1, description="of the middle layer")

    @property
    def reach(self) -> int:
        # The three kernels on high-resolution pixels, and bicubic's two low-resolution ones.
        return -(-(4 + self.kernel // 2 + 2) // self.scale) + 2

    def network(self) -> "Module":
        from llmq.vision.super_resolution_networks import SrcnnNet

        # Random weights as PyTorch gives them: those of the paper (sigma 0.001) need its 10^8 updates.
        return SrcnnNet(self.channels, self.scale, self.kernel)
