"""4-bit NF4 or FP4 (Dettmers et al. 2023, QLoRA), or 8-bit LLM.int8() (Dettmers et al. 2022) by bitsandbytes.

The output head and embeddings stay as they are. Saved in the Hugging Face format.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.errors import UserError, first_line
from llmq.files import LAYERS, write_json
from llmq.layers import Pattern, check_matched, matches
from llmq.text.bnb_layers import is_packed
from llmq.text.family import LanguageModel
from llmq.types import Context, Step

if TYPE_CHECKING:
    from torch.nn import Linear, Module
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from llmq.reopened import Meant
    from llmq.sketch import Sketch, Work

EXPERTS = (
    "quantize.gptq and quantize.rtn pack experts one by one; to keep them in float say so: skip_modules: [experts]"
)


class Bnb(Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"packed": True}

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = Field(True, description="quantize the 4-bit scales too: saves 0.37 bits a weight")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    skip_modules: tuple[Pattern, ...] = Field(
        (), description="left in float, besides the output head, by patterns: [down_proj, layers.1]"
    )

    def check(self) -> None:
        super().check()
        if self.bits == 8:
            self.refuse_unread(("quant_type", "double_quant", "compute_dtype"), "with bits: 8")

    def check_base(self, base: Artifact[LanguageModel]) -> None:
        """Raise `UserError` if bitsandbytes would leave experts, or over a third of the blocks, in float unasked."""
        from llmq.text.opening import without_weights

        self._checked(without_weights(base.weights), base.weights, _is_linear)  # linear layers would be packed

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The blocks' linear layers packed; each is read, packed and written in its turn."""
        from llmq.text.sizing.network import as_text
        from llmq.text.sizing.packing import int8, nf4
        from llmq.text.sizing.work import packing

        source = as_text(before)
        changed = {}
        for part in source.linears:
            if not self._skips(part.name.removesuffix(".weight")):
                packed = nf4(part, self.quant_type, self.double_quant, self.compute_dtype)
                changed[part.name] = packed if self.bits == 4 else int8(part)
        made = source.with_parts(changed)
        return made, packing(source, made, self.bits)

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Quantize the float weights while they load, and write the packed model to `folder`."""
        from llmq.reopened import reopened

        made, saved = self._write(artifact, folder, context)
        return reopened(saved, made, context.device)

    def _write(
        self, artifact: Artifact[LanguageModel], folder: Path, context: Context
    ) -> "tuple[Artifact[LanguageModel], Meant]":
        from llmq.text.names import save
        from llmq.text.opening import load_causal_lm
        from llmq.text.tokenizer import copy_tokenizer

        config = self._config(artifact.weights)
        module = load_causal_lm(artifact.weights, artifact.model.dtype, context.device, quantization_config=config)
        notes = self._checked(module, artifact.weights, is_packed)
        save(module, folder)
        write_json(folder / LAYERS, _facts(module, artifact.weights, self.bits))
        copy_tokenizer(artifact.weights, folder)
        return artifact.then(self, weights=folder, packed=True, notes=notes), _meant(artifact.model, module)

    def _config(self, weights: Path) -> "BitsAndBytesConfig":
        import torch
        from transformers import BitsAndBytesConfig

        skip = self._skipped(weights) if self.skip_modules else None
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skip,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
        )

    def _skips(self, name: str) -> bool:
        return any(matches(pattern, name) for pattern in self.skip_modules)

    def _skipped(self, weights: Path) -> list[str]:
        """The names of the linear layers that stay in float."""
        from transformers.quantizers.base import get_keys_to_not_convert

        from llmq.text.opening import without_weights

        network = without_weights(weights)
        # transformers skips the output head by itself only as long as nobody names another module.
        others = (name for name, layer in network.named_modules() if _is_linear(layer) and self._skips(name))
        return [*get_keys_to_not_convert(network), *others]

    def _checked(self, module: "PreTrainedModel", weights: Path, packs: "Callable[[Module], bool]") -> dict[str, float]:
        """Notes on the packed layers. Raises `UserError` if much of the blocks, or an expert, is left out unasked."""
        from llmq.text.linear_view import blocks_of, is_fused

        inside = [p for block in blocks_of(module) for p in module.get_submodule(block).named_modules(prefix=block)]
        packed = sum(_weights(layer) for _, layer in inside if packs(layer))
        total = packed + sum(_weights(layer) for _, layer in inside if not packs(layer))
        check_matched("skip_modules", self.skip_modules, dict(module.named_modules()))
        named = [n for n, _ in inside if self._skips(n)]
        others = [layer for name, layer in inside if not packs(layer) and name not in named]
        left = sum(map(_weights, others)) / total
        if left > 1 / 3 or any(map(is_fused, others)):
            raise UserError(
                f"bitsandbytes packs linear layers, and {left:.0%} of the weights of the blocks of {str(weights)!r} "
                f"({module.config.model_type}) lie elsewhere, most in {type(max(others, key=_weights)).__name__}; "
                + (EXPERTS if any(map(is_fused, others)) else "leave quantize.bnb out")
            )
        layers = sum(packs(layer) for _, layer in inside)
        return {"quantized_layers": layers, "changed_share": round(packed / total, 4)}


def _facts(module: "PreTrainedModel", weights: Path, bits: int) -> dict[str, dict[str, object]]:
    """The facts about each packed layer beside the float weights in the files; to be taken before any answer.

    An answer packs 4-bit weights anew.
    """
    from safetensors import safe_open
    from transformers.pytorch_utils import Conv1D

    from llmq.matrix.layer_error import layer_facts
    from llmq.text.bnb_layers import weight_of
    from llmq.text.names import stored

    files = stored(weights, module)
    facts = {}
    for name, layer in module.named_modules():
        if is_packed(layer) and f"{name}.weight" in files:
            file, key = files[f"{name}.weight"]
            with safe_open(file, "pt") as opened:
                before = opened.get_tensor(key)
            if issubclass(getattr(layer, "source_cls", object), Conv1D):
                before = before.t()  # [inputs, outputs] in files
            made = weight_of(layer)
            facts[name] = layer_facts(before.to(made.device), made, bits)
    return facts


def _meant(model: LanguageModel, module: "PreTrainedModel") -> "Meant":
    """The record of the packed module. Raises `UserError` for code that reads a packed weight (Mamba's `dt_proj`)."""
    from llmq.reopened import meant

    try:
        return meant(model, module)
    except RuntimeError as error:
        reason = first_line(error)
        raise UserError(
            f"{module.config.model_type} does not run with packed weights ({reason}); it reads one by itself: leave "
            "out the layer, for a Mamba skip_modules: [dt_proj]"
        ) from None


def _is_linear(layer: "Module") -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(layer) is nn.Linear or isinstance(layer, Conv1D)


def _weights(layer: "Module | Linear") -> int:
    """The number of weights that a module itself holds, packed or not; children do not count."""
    if is_packed(layer):
        return int(layer.in_features * layer.out_features)  # type: ignore[operator]
    return sum(p.numel() for p in layer.parameters(recurse=False))
