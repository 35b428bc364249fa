"""Folding an adapter into the weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.needs import Needs
from llmq.plugin import DataWord
from llmq.types import Context, Measurement, Step

if TYPE_CHECKING:
    from llmq.models.reopened import Meant


class Merge(Step):
    """Adds the adapter to the weights in float32, dequantized first if the base is quantized.

    Measures what was lost on held-out text: KL divergence and top-1 agreement of "merged" with "base + adapter".
    The merged weights are float again: a quantized base grows back to full size.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "comparison"
    requires: ClassVar[Mapping[str, bool]] = {"adapter": True}
    leaves: ClassVar[Mapping[str, bool]] = {"adapter": False, "packed": False}

    data: DataWord = Field("pydoc", validate_default=True, description="held-out text for the comparison")
    tokens: PositiveInt = Field(4096, description="how many held-out tokens to compare on")
    window: PositiveInt = 256
    keep_sparsity: bool = Field(False, description="weights that were zero before the adapter are zero again")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="the model's own if unset")

    def space(self, artifact: Artifact) -> int:
        """As many bytes as the weights have; packed ones grow from 4 bits or more to 16."""
        return super().space(artifact) * (4 if artifact.packed else 1)

    def needs(self) -> Needs:
        """Positions for a window."""
        return Needs("window", self.window)

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for data with nothing to compare on."""
        from llmq.tasks.windows import check_rows

        check_rows(base, self.data, "held_out", self.window)

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Write the merged model to `folder`, then compare the two."""
        from llmq.models.reopened import reopened

        what = self._write(artifact, folder, context)
        model = artifact.model.model_copy(update={"dtype": self.dtype} if self.dtype else {})
        merged = artifact.then(self, model=model, weights=folder, adapter=None, packed=False)
        reopened(what, merged, context.device)
        return replace(merged, measurements=self._loss(artifact, merged, context.device))

    def _write(self, artifact: Artifact, folder: Path, context: Context) -> "Meant":
        import torch

        from llmq.adapt.finite import first_not_finite
        from llmq.models.hugging_face import copy_tokenizer, load_causal_lm
        from llmq.models.linear_view import fuse
        from llmq.models.opening import as_opened_in, with_adapter
        from llmq.models.reopened import meant
        from llmq.models.tying import save, untie
        from llmq.quantize.bnb_layers import dequantized

        model: Any = artifact.model
        assert artifact.adapter  # `requires`
        module = load_causal_lm(artifact.weights, "float32", context.device)
        module = dequantized(module) if artifact.packed else module
        pairs = untie(module)  # or an adapter on the head would change the embeddings with it, and the other way round
        zeros = _zeros(module) if self.keep_sparsity else {}
        module = with_adapter(module, artifact.adapter).merge_and_unload(safe_merge=True)
        for name, places in zeros.items():
            module.get_parameter(name).data[places] = 0
        fuse(module)
        as_opened_in(getattr(torch, self.dtype or model.dtype), module)
        if name := first_not_finite(dict(module.named_parameters())):
            raise LlmqError(f"{name} is not finite in {self.dtype or model.dtype}; set dtype: float32")
        save(module, folder, pairs)
        copy_tokenizer(artifact.weights, folder)
        return meant(model, module)

    def _loss(self, adapted: Artifact, merged: Artifact, device: str) -> tuple[Measurement, ...]:
        from llmq.tasks.kl import compare_outputs
        from llmq.tasks.windows import held_out_windows

        split = self.data.read()
        with adapted.open(device) as a, merged.open(device) as b:
            windows, _ = held_out_windows(split, a.processor, self.window, max(1, self.tokens // self.window))
            if not windows:
                raise UserError(f"the held-out part of {self.data.word} has nothing to compare on")
            return compare_outputs(a.module, b.module, windows, device, self.word, "base + adapter", "merged")


def _zeros(module: Any) -> dict[str, Any]:
    """Where the matrices of a model are zero, by parameter; experts held as one tensor are matrices too."""
    return {name: p == 0 for name, p in module.named_parameters() if p.ndim > 1}
