"""SparseGPT (Frantar & Alistarh 2023): prunes by GPTQ's elimination, the weights that stay making up for it.

The model stays dense: neither file nor time shrinks by itself. Embeddings and output head are not pruned.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from llmq.artifact import Artifact
from llmq.matrix.gram import Kind
from llmq.matrix.masks import sparsegpt
from llmq.matrix.solver import elimination
from llmq.sparsity import PruneStep, Pruning, Sparsity
from llmq.text.calibration import Calibrated
from llmq.text.family import LanguageModel
from llmq.types import Context

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.sketch import Sketch, Work


class Sparsegpt(PruneStep[LanguageModel], Calibrated):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    damp_percent: float = Field(0.01, gt=0, lt=1, description="of the mean curvature; raised where it does not suffice")

    gathers_products: ClassVar[bool] = True

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        return self.weighed(before, super().foresee(before))

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Calibrate, and write the pruned model to `folder`; a resumed run goes on after the last whole block."""
        windows, notes = self.windows(artifact, context.seed)
        change = partial(_Sparsegpt, damp_percent=self.damp_percent, by_loss=self.by_loss)
        return self.write(artifact, folder, context, change, windows, self.true_sequential, calibration=notes)


class _Sparsegpt(Pruning):
    gathers: Kind | None = "hessian"  # `X^T X`, (inputs, inputs)

    def __init__(self, sparsities: Mapping[str, Sparsity], damp_percent: float, by_loss: bool):
        super().__init__(sparsities, by_loss)
        self.damp_percent = damp_percent

    def prepared(self, total: "Tensor | None") -> "Tensor | None":
        return None if total is None else elimination(total, self.damp_percent)[0]  # (inputs, inputs)

    def pruned(self, weight: "Tensor", shared: "Tensor | None", level: Sparsity) -> "Tensor":
        assert shared is not None
        return sparsegpt(weight, shared, level.sparsity, level.of_each)  # (outputs, inputs)
