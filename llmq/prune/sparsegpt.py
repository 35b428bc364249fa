"""Pruning with calibration, what stays made to make up for what goes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.calibration import Calibrated
from llmq.prune.masks import sparsegpt
from llmq.prune.sparsity import PruneStep, Pruning, Sparsity, write_pruned
from llmq.quantize.gptq_solver import elimination
from llmq.types import Context, Step


class Sparsegpt(PruneStep, Calibrated, Step):
    """SparseGPT (Frantar & Alistarh 2023): prunes by GPTQ's elimination, the weights that stay making up for it.

    The model stays dense: neither file nor time shrinks by itself. Embeddings and output head are not pruned.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    damp_percent: float = Field(0.01, gt=0, lt=1, description="of the mean curvature; raised where it does not suffice")

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Calibrate, and write the pruned model to `folder`; goes on after a kill where the last block ended."""
        windows, notes = self.windows(artifact, context.seed)
        method = partial(_Sparsegpt, damp_percent=self.damp_percent)
        return write_pruned(self, artifact, folder, context, method, windows, self.true_sequential, calibration=notes)


class _Sparsegpt(Pruning):
    gathers: Literal["hessian", "squares"] | None = "hessian"

    def __init__(self, sparsities: Mapping[str, Sparsity], damp_percent: float):
        super().__init__(sparsities)
        self.damp_percent = damp_percent

    def prepared(self, gathered: Any) -> Any:
        return elimination(gathered, self.damp_percent)[0]

    def pruned(self, weight: Any, shared: Any, its: Sparsity) -> Any:
        return sparsegpt(weight, shared, its.sparsity, its.of_each)
