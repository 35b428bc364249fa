"""Language models that transformers opens."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmq import trust
from llmq.artifact import Artifact
from llmq.guarded.models import check as check_files
from llmq.models import fits, formats, hugging_face
from llmq.models.skeleton import Skeleton
from llmq.needs import Needs
from llmq.types import Clock, Context, Loaded, Model

PROBED = 16
"""Tokens that tell whether two models are one."""


class CausalLM(Model):
    """A causal language model: a hub id, a local Hugging Face folder, a .gguf file, or `smollm2-135m`.

    Only safetensors and GGUF are opened, never pickled weights.
    """

    kind: ClassVar[str] = "causal-lm"
    suite: ClassVar[str] = "text-quick"

    weights: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(
        False, description="that the weights bring code; it runs where the command has --trust-remote-code, too"
    )

    def check(self) -> None:
        """Raise `UserError` for weights that are not there or cannot be opened."""
        self.check_trust()
        hugging_face.check_weights(self.weights)

    def base(self, context: Context) -> Artifact:
        """Bring the weights to this machine: from the hub, or converted once from GGUF."""
        self.check_trust()
        folder, notes = hugging_face.bring(self.weights, self.dtype, self.revision)
        check_files(folder)
        formats.check_network(folder)
        packed = formats.quantization(folder) is not None
        return Artifact(model=self, weights=folder, packed=packed, notes=notes)

    def open(self, artifact: Artifact, device: str) -> Loaded:
        """The module in evaluation mode with its adapter if there is one, and the tokenizer."""
        self.check_trust()
        module = hugging_face.load_causal_lm(artifact.weights, self.dtype, device)
        if artifact.adapter:
            from llmq.models.opening import with_adapter
            from llmq.quantize.bnb_layers import keep_unpacked, reads_weights

            module = with_adapter(module, artifact.adapter).eval()
            if reads_weights(module):
                keep_unpacked(module)
        tokenizer = hugging_face.load_tokenizer(artifact.weights)
        if placeholders := fits.check_fits(module, tokenizer):
            fits.refuse_ids_beyond(module, placeholders)
        return Loaded(module, tokenizer, device, artifact)

    def check_fits(self, artifact: Artifact, needs: Mapping[str, Needs]) -> None:
        """Raise `UserError` for a tokenizer of another model, or for more tokens than it has positions for."""
        from llmq.models.opening import without_weights

        self.check_trust()
        tokenizer = hugging_face.load_tokenizer(artifact.weights)
        fits.check_fits(without_weights(artifact.weights), tokenizer, needs)

    def probe(self, module: Any) -> Sequence[Any]:
        """The logits after tokens from all over the vocabulary, `[1, tokens, vocabulary]`."""
        import torch

        rows = len(module.get_input_embeddings().weight)
        tokens = torch.arange(PROBED, device=module.device)[None] * (rows // PROBED or 1) % rows
        with torch.inference_mode():
            return [module.eval()(input_ids=tokens, use_cache=False).logits.cpu()]

    def skeleton(self, artifact: Artifact, device: str) -> Skeleton:
        """What a step that changes weights works on: a block of it in memory at a time."""
        self.check_trust()
        return Skeleton.of(artifact, device)

    def check_trust(self) -> None:
        """Raise `UserError` where it is written that the weights bring code, and nobody said so on the command."""
        if self.trust_remote_code:
            trust.need_remote_code(f"trust_remote_code: true asks to run Python that {self.weights!r} brings")

    def clocks(self, loaded: Loaded, speed: Any) -> Iterable[Clock]:
        """One prefill of `prompt_tokens`, and one decode of `new_tokens`."""
        from llmq.models.generation import clocks

        return clocks(loaded, speed.name, speed.prompt_tokens, speed.new_tokens, speed.rounds)
