"""Quantization on loading, without calibration: bitsandbytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmq.types import Artifact, Context, Step


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

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Load the float weights quantized, and save them so."""
        from llmq.errors import UserError
        from llmq.models.hugging_face import copy_tokenizer, load_causal_lm
        from llmq.models.tying import save

        model: Any = artifact.model
        module = load_causal_lm(
            artifact.weights,
            model.dtype,
            context.device,
            model.trust_remote_code,
            quantization_config=self._config(artifact.weights, model.trust_remote_code),
        )
        layers = self._layers(module)
        if not layers:
            raise UserError(f"quantize.bnb found no linear layer to quantize in {artifact.weights}")
        save(module, folder)
        copy_tokenizer(artifact.weights, folder)
        return artifact.then(self, weights=folder, packed=True, notes={"quantized_layers": layers})

    def _config(self, weights: Path, trust_remote_code: bool) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        skip = [*_default_skips(weights, trust_remote_code), *self.skip_modules] if self.skip_modules else None
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skip,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
        )

    def _layers(self, module: Any) -> int:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        return sum(isinstance(layer, Linear4bit | Linear8bitLt) for layer in module.modules())


def _default_skips(weights: Path, trust_remote_code: bool) -> list[str]:
    # transformers skips the output head by itself only as long as nobody names another module.
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)
    with init_empty_weights():
        return list(get_keys_to_not_convert(AutoModelForCausalLM.from_config(config)))
