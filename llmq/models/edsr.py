"""EDSR (Lim et al. 2017); unless set, its baseline of 16 blocks and 64 filters.

The full network has 32 blocks, 256 filters and residuals scaled by 0.1. In 3 dimensions it enlarges volumes, and its
tail is a single convolution: the baseline's, which has no activation, would hold scale³ times the features.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.errors import UserError
from llmq.vision.super_resolution import SuperResolution

if TYPE_CHECKING:
    from torch.nn import Module


class Edsr(SuperResolution):
    tile_of_graphs: ClassVar[int] = 512
    """Exported, it multiplies at low resolution alone: 70 MB more than by 256, and 1.15, not 1.5, times the pixels of
    an image of 1,000. SRResNet takes 2.4 GB more by 512."""

    n_resblocks: PositiveInt = 16
    n_feats: PositiveInt = 64
    res_scale: PositiveFloat = Field(1.0, description="factor on each residual; 0.1 steadies the full network")
    dimensions: Literal[2, 3] = Field(2, description="3: of volumes, for data.rock with dimensions: 3")

    @property
    def volumetric(self) -> bool:
        return self.dimensions == 3

    @property
    def reach(self) -> int:
        if self.volumetric:
            return 1 + 2 * self.n_resblocks + 1 + 1
        # Kernels of 3: the first, two a block, one after, and one or two on the way up to the last.
        return 1 + 2 * self.n_resblocks + 1 + 2 + 1

    def network(self) -> "Module":
        from llmq.vision.super_resolution_networks import EdsrNet, VolumeNet

        if self.volumetric:
            return VolumeNet(self.channels, self.scale, self.n_resblocks, self.n_feats, self.res_scale)
        return EdsrNet(self.channels, self.scale, self.n_resblocks, self.n_feats, self.res_scale)

    def check_runtime(self, runtime: str) -> None:
        if self.volumetric:
            raise UserError(f"edsr of 3 dimensions is not exported to {runtime}; leave the step out, it runs in torch")

    def deployed(self, network: "Module") -> "Module":
        from llmq.vision.super_resolution_networks import EdsrNet, FoldedEdsr

        self.check_runtime("openvino")
        assert isinstance(network, EdsrNet)
        return FoldedEdsr(network)  # without activations, the tail is one convolution
