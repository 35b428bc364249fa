"""Wide activations under weight normalization."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.models.super_resolution import SuperResolution
from llmq.models.vision import Learning
from llmq.types import Model

EXPANSION = {"A": 4, "B": 6}


class Wdsr(SuperResolution, Model):
    """WDSR A and B (Yu et al. 2018): wide before each activation, and every convolution weight-normalized."""

    learning: ClassVar[Learning] = replace(SuperResolution.learning, learning_rate=1e-3)

    variant: Literal["A", "B"] = Field("B", description="B splits the second convolution in two of low rank")
    n_resblocks: PositiveInt = 16
    n_feats: PositiveInt = 32
    expansion: PositiveInt | None = Field(None, description="width before an activation over n_feats; A: 4, B: 6")
    res_scale: PositiveFloat = Field(1.0, description="factor on each residual")

    @property
    def reach(self) -> int:
        """Kernels of 3: the first, two (A) or one (B) a block, and the last; the skip's 5 is less."""
        return 1 + (2 if self.variant == "A" else 1) * self.n_resblocks + 1

    def network(self) -> Any:
        """Random weights as PyTorch gives them, as direction and length."""
        from llmq.models.super_resolution_networks import WdsrNet, wide, wide_low_rank
        from llmq.models.weight_norm import normalize

        body = wide if self.variant == "A" else wide_low_rank
        expansion = self.expansion or EXPANSION[self.variant]
        bodies = [body(self.n_feats, expansion) for _ in range(self.n_resblocks)]
        return normalize(WdsrNet(self.channels, self.scale, self.n_feats, bodies, self.res_scale))
