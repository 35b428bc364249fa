"""Adds the adapter to the weights in float32, dequantized first if the base is quantized.

Measures the loss of quality on held-out text: KL divergence and top-1 agreement of "merged" with "base + adapter".
The merged weights are float again: a quantized base grows back to full size.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.plugin import DataWord
from llmq.text.family import LanguageModel
from llmq.types import Context, Measurement, Needs, Step

if TYPE_CHECKING:
    from llmq.reopened import Meant
    from llmq.sketch import Sketch, Work


class Merge(Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "comparison"
    requires: ClassVar[Mapping[str, bool]] = {"adapter": True}
    leaves: ClassVar[Mapping[str, bool | str]] = {"adapter": False, "packed": False}

    data: DataWord = Field("pydoc", validate_default=True, description="held-out text for the comparison")
    tokens: PositiveInt = Field(4096, description="held-out tokens to compare on")
    window: PositiveInt = 256
    keep_sparsity: bool = Field(False, description="weights that were zero before the adapter are zero again")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="the model's own if unset")

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """Floats again; the sum is made in float32, and both models are open for the comparison."""
        from dataclasses import replace

        from llmq.sketch import BYTES, Work, times
        from llmq.text.sizing import packing, work
        from llmq.text.sizing.network import as_text

        source = as_text(before)
        dtype = self.dtype or source.dtype
        made = replace(source, parts=packing.float_again(source, dtype), dtype=dtype)
        merging = Work(made.parameters * BYTES["float32"], {"copy": 24.0 * made.in_memory}, 2 * work.PROBES)
        windows = max(1, self.tokens // self.window)
        both = work.forward(source, 1, self.window).plus(work.forward(made, 1, self.window))
        passes = work.forward(source, 1, self.window), work.forward(made, 1, self.window)
        beside = source.in_memory + both.memory + 4 * 8 * self.window * source.vocabulary
        compared = replace(times(passes[0], windows).plus(times(passes[1], windows)), memory=beside)
        return made, merging.plus(compared).plus(work.opening(source)).plus(work.opening(made))

    def space(self, artifact: Artifact[LanguageModel]) -> int:
        return super().space(artifact) * (4 if artifact.packed else 1)  # from 4 bits or more to 16

    def needs(self) -> Needs:
        return Needs("window", self.window)

    def check_base(self, base: Artifact) -> None:
        from llmq.text.windows import check_rows

        check_rows(base, self.data, "held_out", self.window)

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Write the merged model to `folder`, then measure the divergence from "base + adapter"."""
        from llmq.reopened import reopened

        saved = self._write(artifact, folder, context)
        model = artifact.model.model_copy(update={"dtype": self.dtype} if self.dtype else {})
        merged = artifact.then(self, model=model, weights=folder, adapter=None, packed=False)
        reopened(saved, merged, context.device)
        return replace(merged, measurements=self._loss(artifact, merged, context.device))

    def _write(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> "Meant":
        import torch

        from llmq.finite import first_not_finite
        from llmq.reopened import meant
        from llmq.text.bnb_layers import dequantized
        from llmq.text.linear_view import fuse
        from llmq.text.names import save, untie
        from llmq.text.opening import as_opened_in, load_causal_lm, with_adapter
        from llmq.text.tokenizer import copy_tokenizer

        dtype = self.dtype or artifact.model.dtype
        assert artifact.adapter  # `requires`
        module = load_causal_lm(artifact.weights, "float32", context.device)  # the sum is rounded once, at the end
        module = dequantized(module) if artifact.packed else module
        pairs = untie(module)  # or an adapter on the head would change the embeddings, and the other way round
        matrices = module.named_parameters() if self.keep_sparsity else ()  # experts held as one tensor among them
        zeros = {name: p == 0 for name, p in matrices if p.ndim > 1}
        module = with_adapter(module, artifact.adapter).merge_and_unload(safe_merge=True)
        for name, places in zeros.items():
            module.get_parameter(name).data[places] = 0
        fuse(module)
        as_opened_in(getattr(torch, dtype), module)
        if name := first_not_finite(dict(module.named_parameters())):
            raise LlmqError(f"{name} is not finite in {dtype}; set dtype: float32")
        save(module, folder, pairs)
        copy_tokenizer(artifact.weights, folder)
        return meant(artifact.model, module)

    def _loss(self, adapted: Artifact, merged: Artifact, device: str) -> tuple[Measurement, ...]:
        from llmq.text.losses import divergence
        from llmq.text.windows import held_out_windows

        split = self.data.read()
        with adapted.open(device) as a, merged.open(device) as b:
            windows, _ = held_out_windows(split, a.processor, self.window, max(1, self.tokens // self.window))
            if not windows:
                raise UserError(f"the held-out part of {self.data.word} has nothing to compare on")
            count = f"{len(windows)} windows, {sum(window.scored for window in windows)} tokens"
            protocol = f"merged against base + adapter on held-out text, {count}"
            tokens = [window.tokens for window in windows]
            return divergence(a.module, b.module, tokens, device, self.word, "kl_divergence", protocol)
