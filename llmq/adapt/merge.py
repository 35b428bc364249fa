"""Adds the adapter to the weights in float32, dequantized first if the base is quantized.

Measures the loss of quality on held-out text: KL divergence and top-1 agreement of "merged" with "base + adapter".
The merged weights are float again: a quantized base grows back to full size. An adapter with `use_qalora` folds into
the zero points of GPTQ's grid, which then are no whole numbers, as GPTQ's format wants them. So the weights are floats
on that grid, its scales and zero points lie beside them, and `export.gguf` carries the grid as Q4_1 without loss.
With `into: gptq` the sum is rounded again as `quantize.gptq` does it, to the bits and groups of the base, and the loss
that is measured is that of merging and rounding.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.sparsity import was_pruned
from llmq.text.family import LanguageModel
from llmq.text.formats import grid_of
from llmq.types import Context, Measurement, Needs, Step

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work

FLOATS = ".floats"
"""The folder of the merged floats until they are rounded again."""


class Merge(Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "comparison"
    requires: ClassVar[Mapping[str, bool]] = {"adapter": True}
    leaves: ClassVar[Mapping[str, bool | str]] = {"adapter": False, "packed": False}

    data: DataWord = Field("pydoc", validate_default=True, description="held-out text for the comparison")
    tokens: PositiveInt = Field(4096, description="held-out tokens to compare on")
    window: PositiveInt = 256
    into: Literal["gptq"] | None = Field(
        None, description="gptq: round the sum again, calibrated on the training part of `data`; floats if unset"
    )
    keep_sparsity: bool | None = Field(
        None,
        description="weights that were zero before the adapter are zero again; if unset, where single weights of a "
        "float base were pruned",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="the model's own if unset")

    @property
    def left(self) -> "Mapping[str, bool | str]":
        return {**self.leaves, "packed": self.into is not None}

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """Floats again; the sum is made in float32, and compared, block by block."""
        from dataclasses import replace

        from llmq.sketch import Work
        from llmq.text.sizing import packing, work
        from llmq.text.sizing.network import as_text

        source = as_text(before)
        dtype = self.dtype or source.dtype
        made = floats = replace(source, parts=packing.float_again(source, dtype), dtype=dtype)
        rounding = Work()
        if self.into:
            rounded, rounding = self._rounding(packing.grid_of(source)).foresee(made)
            made = as_text(rounded)
        compared = work.by_block(source, made, max(1, self.tokens // self.window), self.window)
        return made, work.merging(source, floats).plus(rounding).plus(compared)

    def space(self, artifact: Artifact[LanguageModel]) -> int:
        floats = super().space(artifact) * (4 if artifact.packed else 1)  # from 4 bits or more to 16
        return floats * 2 if self.into else floats

    def needs(self) -> Needs:
        return Needs("window", self.window)

    def check_base(self, base: Artifact) -> None:
        from llmq.text.windows import check_rows

        check_rows(base, self.data, "held_out", self.window)

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Write the merged model to `folder`, then measure the divergence from "base + adapter"."""
        from llmq.reopened import reopened
        from llmq.text.merging import merge

        floats = folder / FLOATS if self.into else folder
        floats.mkdir(exist_ok=True)
        pruned = was_pruned(artifact.history) and not artifact.packed  # grids have zeros of their own
        keep = pruned if self.keep_sparsity is None else self.keep_sparsity
        saved = merge(artifact, floats, self.dtype or artifact.model.dtype, keep)
        model = artifact.model.model_copy(update={"dtype": self.dtype} if self.dtype else {})
        merged = artifact.then(self, model=model, weights=floats, adapter=None, packed=False)
        reopened(saved, merged, "cpu")
        if self.into:
            rounded = self._rounding(grid_of(artifact.weights)).apply(merged, folder, context)
            merged = replace(merged, weights=folder, packed=True, notes=rounded.notes)
        measured = replace(merged, measurements=self._loss(artifact, merged, context.device))
        if self.into:
            shutil.rmtree(floats)
        return measured

    def _rounding(self, grid: "Mapping[str, object]") -> "Step[LanguageModel]":
        step = plugin.build({f"quantize.{self.into}": {**grid, "data": self.data}})
        assert isinstance(step, Step)
        return step

    def _loss(self, adapted: Artifact, merged: Artifact, device: str) -> tuple[Measurement, ...]:
        from llmq.text.losses import divergence
        from llmq.text.tokenizer import end_marks
        from llmq.text.windows import held_out_windows

        split = self.data.read()
        with adapted.open(device) as a, merged.open(device) as b:
            most, ends = max(1, self.tokens // self.window), end_marks(adapted.weights)
            windows, _ = held_out_windows(split, a.processor, self.window, most, ends)
            if not windows:
                raise UserError(f"the held-out part of {self.data.word} has nothing to compare on")
            count = f"{len(windows)} windows, {sum(window.scored for window in windows)} tokens"
            protocol = f"merged against base + adapter on held-out text, {count}"
            tokens = [window.tokens for window in windows]
            return divergence(a.module, b.module, tokens, device, self.word, "kl_divergence", protocol, by_block=True)
