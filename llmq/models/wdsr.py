"""WDSR A and B (Yu et al. 2018): wide before each activation, and every convolution weight-normalized."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.vision.family import Training
from llmq.vision.super_resolution import SuperResolution

EXPANSION = {"A": 4, "B": 6}  # widths over n_feats

if TYPE_CHECKING:
    from torch.nn import Module


class Wdsr(SuperResolution):
    training: ClassVar[Training] = replace(SuperResolution.training, learning_rate=1e-3)

    variant: Literal["A", "B"] = Field("B", description="B splits the second convolution in two of low rank")
    n_resblocks: PositiveInt = 16
    n_feats: PositiveInt = 32
    expansion: PositiveInt | None = Field(None, description="width before an activation over n_feats; A: 4, B: 6")
    res_scale: PositiveFloat = Field(1.0, description="factor on each residual")

    @property
    def reach(self) -> int:
        # Kernels of 3: the first, two (A) or one (B) a block, and the last; the skip's 5 is less.
        return 1 + (2 if self.variant == "A" else 1) * self.n_resblocks + 1

    def network(self) -> "Module":
        from torch import nn

        from llmq.vision.shapes import with_weight_norm
        from llmq.vision.super_resolution_networks import WdsrNet, wide, wide_low_rank

        block = wide if self.variant == "A" else wide_low_rank
        expansion = self.expansion or EXPANSION[self.variant]
        blocks = [block(self.n_feats, expansion, self.res_scale) for _ in range(self.n_resblocks)]
        network = WdsrNet(self.channels, self.scale, self.n_feats, blocks)
        with_weight_norm(network, {n: 0 for n, m in network.named_modules() if isinstance(m, nn.Conv2d)})
        return network
