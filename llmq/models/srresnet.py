"""SRResNet (Ledig et al. 2017): the generator of SRGAN, here trained on L1."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from llmq.vision.super_resolution import SuperResolution

if TYPE_CHECKING:
    from torch.nn import Module


class Srresnet(SuperResolution):
    n_resblocks: PositiveInt = 16
    n_feats: PositiveInt = 64
    prelu: Literal["one", "per_channel"] = Field("one", description="slopes of each PReLU")

    @property
    def reach(self) -> int:
        # Kernels of 9, then two of 3 a block, one after, and one or two on the way up to the last of 9.
        return 4 + 2 * self.n_resblocks + 1 + 2 + 4

    def network(self) -> "Module":
        from torch import nn

        from llmq.vision.super_resolution_networks import SrResNetNet

        slopes = 1 if self.prelu == "one" else self.n_feats  # of all channels, or of each
        return SrResNetNet(self.channels, self.scale, self.n_resblocks, self.n_feats, lambda: nn.PReLU(slopes))
