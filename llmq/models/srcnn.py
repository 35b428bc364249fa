"""The first convolutional network for super-resolution."""

from typing import Any, Literal

from pydantic import Field

from llmq.models.super_resolution import SuperResolution
from llmq.types import Model


class Srcnn(SuperResolution, Model):
    """SRCNN (Dong et al. 2016): three convolutions over the bicubic image.

    8,129 parameters at one channel with the paper's 9-1-5, 57,281 with its best, 9-5-5. Its convolutions work at the
    size of the output: small on disk, and slow for its size.
    """

    kernel: Literal[1, 3, 5] = Field(1, description="of the middle layer")

    @property
    def reach(self) -> int:
        """The three kernels on high-resolution pixels, and bicubic's two low-resolution ones."""
        return -(-(4 + self.kernel // 2 + 2) // self.scale) + 2

    def network(self) -> Any:
        """Random weights as PyTorch gives them: the paper's (sigma 0.001) need its 10^8 updates."""
        from llmq.models.super_resolution_networks import SrcnnNet

        return SrcnnNet(self.channels, self.scale, self.kernel)
