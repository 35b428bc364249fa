"""Quantization on loading, without calibration: bitsandbytes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.quantize.bnb_layers import is_packed
from llmq.types import Context, Step

if TYPE_CHECKING:
    from llmq.models.reopened import Meant

EXPERTS = (
    "quantize.gptq and quantize.rtn pack experts one by one; to keep them in float say so: skip_modules: [experts]"
)


class Bnb(Step):
    """4-bit NF4 or FP4 (Dettmers et al. 2023, QLoRA), or 8-bit LLM.int8() (Dettmers et al. 2022) by bitsandbytes.

    The output head and embeddings stay as they are. Saved in the Hugging Face format.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool]] = {"packed": True}

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = Field(True, description="quantize the 4-bit scales too: saves 0.37 bits a weight")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    skip_modules: tuple[str, ...] = Field((), description="left in float, besides the output head")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for a model whose experts bitsandbytes would leave as they are."""
        from llmq.models.opening import without_weights

        self._checked(without_weights(base.weights), base.weights, _is_linear)

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Load the float weights quantized, and save them so."""
        from llmq.models.reopened import reopened

        made, what = self._write(artifact, folder, context)
        return reopened(what, made, context.device)

    def _write(self, artifact: Artifact, folder: Path, context: Context) -> "tuple[Artifact, Meant]":
        from llmq.models.hugging_face import copy_tokenizer, load_causal_lm
        from llmq.models.tying import save

        model: Any = artifact.model
        module = load_causal_lm(
            artifact.weights,
            model.dtype,
            context.device,
            quantization_config=self._config(artifact.weights),
        )
        notes = self._checked(module, artifact.weights, is_packed)
        save(module, folder)
        copy_tokenizer(artifact.weights, folder)
        return artifact.then(self, weights=folder, packed=True, notes=notes), _meant(model, module)

    def _config(self, weights: Path) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        skip = [*_default_skips(weights), *self.skip_modules] if self.skip_modules else None
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skip,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
        )

    def _checked(self, module: Any, weights: Path, packs: Callable[[Any], bool]) -> dict[str, Any]:
        """Notes on what it `packs`. Raises `UserError` if much of the blocks, or their experts, is left out unasked."""
        from llmq.models.linear_view import is_fused
        from llmq.models.skeleton import blocks_of

        inside = [p for block in blocks_of(module) for p in module.get_submodule(block).named_modules(prefix=block)]
        packed = sum(_weights(layer) for _, layer in inside if packs(layer))
        total = packed + sum(_weights(layer) for _, layer in inside if not packs(layer))
        named = [n for n, _ in inside if any(word in n for word in self.skip_modules)]
        others = [layer for name, layer in inside if not packs(layer) and name not in named]
        left = sum(map(_weights, others)) / total
        if left > 1 / 3 or any(map(is_fused, others)):
            raise UserError(
                f"bitsandbytes packs linear layers, and {left:.0%} of the weights of the blocks of {str(weights)!r} "
                f"({module.config.model_type}) lie elsewhere, most in {type(max(others, key=_weights)).__name__}; "
                + (EXPERTS if any(map(is_fused, others)) else "leave quantize.bnb out")
            )
        return {
            "quantized_layers": sum(packs(layer) for _, layer in inside),
            "changed_share": round(packed / total, 4),
        }


def _meant(model: Any, module: Any) -> "Meant":
    """What was meant. Raises `UserError` for a network that reads a packed weight by itself (Mamba's `dt_proj`)."""
    from llmq.models.reopened import meant

    try:
        return meant(model, module)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{module.config.model_type} does not run with packed weights ({reason}); it reads one by itself: leave "
            "out the layer, for a Mamba skip_modules: [dt_proj]"
        ) from None


def _is_linear(layer: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(layer) is nn.Linear or isinstance(layer, Conv1D)


def _weights(layer: Any) -> int:
    """How many weights a module itself holds, packed or not."""
    if is_packed(layer):
        return int(layer.in_features * layer.out_features)
    return sum(p.numel() for p in layer.parameters(recurse=False))


def _default_skips(weights: Path) -> list[str]:
    # transformers skips the output head by itself only as long as nobody names another module.
    from transformers.quantizers.base import get_keys_to_not_convert

    from llmq.models.opening import without_weights

    return list(get_keys_to_not_convert(without_weights(weights)))
