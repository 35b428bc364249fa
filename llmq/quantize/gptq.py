"""Quantization with calibration: GPTQ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.calibration import Calibrated
from llmq.models.skeleton import Skeleton
from llmq.quantize.grid_settings import GridStep, RoundToNearest
from llmq.types import Context, Step


class Gptq(GridStep, Calibrated, Step):
    """GPTQ (Frantar et al. 2022): weights rounded one input at a time, each error made good by the inputs after it.

    Block by block in bounded memory; layers that share an input share its Hessian. Written in the GPTQ format that
    GPTQModel, transformers and vLLM open. Output head and embeddings stay as they are unless `modules` names them.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool]] = {"packed": True}

    desc_act: bool = Field(True, description="inputs of the largest activations first")
    static_groups: bool = Field(True, description="groups fixed beforehand: desc_act then costs nothing at inference")
    damp_percent: float = Field(0.05, gt=0, lt=1, description="of the mean curvature; raised where it does not suffice")
    keep_sparsity: bool | None = Field(None, description="zeros stay zero; if unset, where a prune step came before")

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Calibrate, and write the quantized model to `folder`; goes on after a kill where the last block ended."""
        from llmq.blockwise import rewrite
        from llmq.quantize.grid_settings import told, write_config

        source = Skeleton.of(artifact, context.device)
        grids = self.grids(source)
        windows, calibration = self.windows(artifact, context.seed)
        method = _Gptq(grids, self, any(word.startswith("prune.") for word in artifact.history))
        unseen = rewrite(source, folder, method, windows, self.true_sequential)
        write_config(
            source,
            folder,
            grids,
            self,
            desc_act=self.desc_act and not self.static_groups,
            static_groups=self.static_groups,
            damp_percent=self.damp_percent,
            true_sequential=self.true_sequential,
        )
        notes = {
            **told(source, grids),
            "calibration": calibration,
            "damping": method.dampings,
            "layers_without_calibration": len(unseen) or None,
        }
        return artifact.then(self, weights=folder, packed=True, notes=notes)


class _Gptq(RoundToNearest):
    gathers: Literal["hessian", "squares"] | None = "hessian"

    def __init__(self, grids: Mapping[str, Any], step: Gptq, pruned: bool):
        super().__init__(grids)
        self.step = step
        self.keep_zeros = pruned if step.keep_sparsity is None else step.keep_sparsity
        self.dampings: dict[str, float] = {}

    def change(self, layers: Mapping[str, Any], gathered: Any) -> dict[str, dict[str, Any]]:
        """The four tensors of layers that share an input, by one factorization of its Hessian."""
        import torch

        from llmq.quantize import gptq_format
        from llmq.quantize.gptq_solver import elimination, solve

        order = gathered.diagonal().argsort(descending=True, stable=True) if self.step.desc_act else None
        upper, damping = elimination(gathered, self.step.damp_percent, order)
        if damping != self.step.damp_percent:
            self.dampings |= dict.fromkeys(layers, damping)
        changed: dict[str, dict[str, Any]] = {}
        # Those on one grid are solved side by side: the time of a solution is the number of its inputs.
        for grid in dict.fromkeys(self.grids[name] for name in layers):
            names = [name for name in layers if self.grids[name] == grid]
            made = solve(
                torch.cat([layers[name] for name in names]).float(),
                upper,
                grid.bits,
                grid.group_size,
                grid.sym,
                grid.mse,
                order,
                self.step.static_groups,
                self.keep_zeros,
            )
            parts = made.split([len(layers[name]) for name in names])
            changed |= {
                name: gptq_format.to_tensors(part, self.format) for name, part in zip(names, parts, strict=True)
            }
        return changed
