"""Residual blocks without normalization."""

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.models.super_resolution import SuperResolution
from llmq.types import Model


class Edsr(SuperResolution, Model):
    """EDSR (Lim et al. 2017); unless set, its baseline of 16 blocks and 64 filters.

    The full one has 32 blocks, 256 filters and residuals scaled by 0.1.
    """

    n_resblocks: PositiveInt = 16
    n_feats: PositiveInt = 64
    res_scale: PositiveFloat = Field(1.0, description="factor on each residual; 0.1 steadies the full network")

    @property
    def reach(self) -> int:
        """Kernels of 3: the first, two a block, one after, and one or two on the way up to the last."""
        return 1 + 2 * self.n_resblocks + 1 + 2 + 1

    def network(self) -> Any:
        """Random weights as PyTorch gives them."""
        from llmq.models.super_resolution_networks import EdsrNet

        return EdsrNet(self.channels, self.scale, self.n_resblocks, self.n_feats, self.res_scale)

    def deployed(self, network: Any) -> Any:
        """Its way up has no activations: one convolution instead of three."""
        from llmq.models.super_resolution_networks import FoldedEdsr

        return FoldedEdsr(network)
