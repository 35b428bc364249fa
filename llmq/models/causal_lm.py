"""A causal language model: a hub id, a local Hugging Face folder, a .gguf file, or `smollm2-135m`.

Only safetensors and GGUF are opened, never pickled weights.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmq import trust
from llmq.artifact import Artifact
from llmq.guarded.weights import check_folder
from llmq.text import formats, weights
from llmq.text.family import LanguageModel
from llmq.types import Context

if TYPE_CHECKING:
    from llmq.sketch import Work


class CausalLM(LanguageModel):
    runtime: Literal["torch", "openvino"] = Field(
        "torch", description="openvino: a .gguf file as it is, or a folder with openvino_model.xml; not to be changed"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(
        False, description="that the weights bring code; it runs where the command has --trust-remote-code, too"
    )

    def check(self) -> None:
        """Raise `UserError` for code that is not trusted, and for weights that are not there or cannot be opened."""
        self.check_trust()
        if not formats.is_hub_id(self.weights):
            self.refuse_unread(("revision",), "on weights that are no repository of the hub")
        if self.runtime == "openvino":
            weights.check_for_openvino(self.weights)
        else:
            weights.check_weights(self.weights)

    def foresee_base(self) -> "Work":
        from llmq.sketch import Work
        from llmq.text.sizing.network import as_text
        from llmq.text.sizing.work import converted

        if self.runtime == "openvino" or weights.is_converted(self.weights, self.dtype):
            return Work()
        return converted(as_text(self.sketch()))

    def base(self, context: Context) -> Artifact:
        """Bring the weights to this machine, from the hub or by a conversion of GGUF, which a cache keeps."""
        self.check_trust()
        if self.runtime == "openvino":
            from llmq.text.gguf.graph import bring

            folder, notes = bring(self.weights)
            return Artifact(model=self, weights=folder, runtime="openvino", packed=True, notes=notes)
        folder, notes = weights.bring(self.weights, self.dtype, self.revision)
        check_folder(folder)
        formats.check_network(folder)
        packed = formats.quantization(folder) is not None  # refused by steps that need floats
        return Artifact(model=self, weights=folder, packed=packed, notes=notes)

    def check_trust(self) -> None:
        if self.trust_remote_code:
            trust.need_remote_code(f"trust_remote_code: true asks to run Python that {self.weights!r} brings")
