"""GPTQ (Frantar et al. 2022): weights rounded one input at a time, each error made good by the inputs after it.

Block by block in bounded memory; layers that share an input share its Hessian. Written in the GPTQ format that
GPTQModel, transformers and vLLM open. Output head and embeddings stay as they are unless `modules` names them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from llmq.artifact import Artifact
from llmq.text.calibration import Calibrated
from llmq.text.family import LanguageModel
from llmq.text.grids import Gptq as Change
from llmq.text.grids import Grid
from llmq.text.rounding import GridStep
from llmq.types import Context

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work
    from llmq.text.sensitivity import Sizes, Table

FEW = 8
"""Windows that tell how far a change moves a model."""


class Gptq(GridStep, Calibrated):
    desc_act: bool = Field(True, description="inputs of the largest activations first")
    static_groups: bool = Field(True, description="groups fixed beforehand: desc_act then costs nothing at inference")
    damp_percent: float = Field(0.05, gt=0, lt=1, description="of the mean curvature; raised where it does not suffice")
    sweeps: int | None = Field(
        None, ge=0, le=16, description="of coordinate descent afterwards, scales fitted; if unset, 2 at 2 and 3 bits"
    )
    keep_sparsity: bool | None = Field(None, description="zeros stay zero; if unset, where a prune step came before")

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        return self.weighed(before, super().foresee(before))

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Calibrate, and write the quantized model to `folder`; a resumed run goes on after the last whole block."""
        pruned = any(word.startswith("prune.") for word in artifact.history)
        few = 2 if self.bits < 4 else 0  # where the error of GPTQ is large, they take 8 to 9 % of the divergence
        sweeps = few if self.sweeps is None else self.sweeps
        keep_zeros = pruned if self.keep_sparsity is None else self.keep_sparsity

        def change(grids: Mapping[str, Grid]) -> Change:
            order = self.desc_act, self.static_groups
            return Change(grids, self.damp_percent, *order, keep_zeros, self.by_loss, sweeps)

        windows, calibration = self.windows(artifact, context.seed)
        settings = {
            "desc_act": self.desc_act and not self.static_groups,  # static groups lie in memory order
            "static_groups": self.static_groups,
            "damp_percent": self.damp_percent,
            "true_sequential": self.true_sequential,
        }
        return self.write(artifact, folder, context, change, windows, settings, calibration=calibration)

    def foretold(self, artifact: Artifact[LanguageModel], context: Context) -> "Table":
        """The costs and bytes of each layer on many grids, foretold from this calibration; kept in the cache."""
        from llmq.text.sensitivity import table_of

        return table_of(artifact, self, context.seed, context.device)

    def sizes(self, artifact: Artifact[LanguageModel], context: Context) -> "Sizes":
        """The bytes of each layer on many grids."""
        from llmq.text.sensitivity import sizes_of

        return sizes_of(artifact, artifact.model.skeleton(artifact, context.device), self.sym)

    def lost(self, changed: Artifact[LanguageModel], base: Artifact[LanguageModel], context: Context) -> float:
        """The divergence of a changed model from its base in nats a token, on a few windows of the calibration."""
        from llmq.text.end_check import divergence_of

        windows, _ = self.windows(base, context.seed)
        skeletons = [stage.model.skeleton(stage, context.device) for stage in (changed, base)]
        return divergence_of(skeletons[0], skeletons[1], windows[:: -(-len(windows) // FEW)])
