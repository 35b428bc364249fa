"""EDSR (Lim et al. 2017); unless set, its baseline of 16 blocks and 64 filters.

The full network has 32 blocks, 256 filters and residuals scaled by 0.1.
"""

from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.vision.super_resolution import SuperResolution

if TYPE_CHECKING:
    from torch.nn import Module


class Edsr(SuperResolution):
    n_resblocks: PositiveInt = 16
    n_feats: PositiveInt = 64
    res_scale: PositiveFloat = Field(1.0, description="factor on each residual; 0.1 steadies the full network")

    @property
    def reach(self) -> int:
        # Kernels of 3: the first, two a block, one after, and one or two on the way up to the last.
        return 1 + 2 * self.n_resblocks + 1 + 2 + 1

    def network(self) -> "Module":
        from llmq.vision.super_resolution_networks import EdsrNet

        return EdsrNet(self.channels, self.scale, self.n_resblocks, self.n_feats, self.res_scale)

    def deployed(self, network: "Module") -> "Module":
        from llmq.vision.super_resolution_networks import EdsrNet, FoldedEdsr

        assert isinstance(network, EdsrNet)
        return FoldedEdsr(network)  # without activations, the tail is one convolution
