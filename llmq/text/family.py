"""The family of causal language models: opening, probing, rewriting and timing one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from llmq.artifact import Artifact
from llmq.files import at_home, bytes_of
from llmq.text.opening import load_causal_lm, with_adapter, without_weights
from llmq.text.skeleton import Skeleton
from llmq.text.tokenizer import check_fits, load_tokenizer, refuse_ids_beyond
from llmq.types import Clock, Loaded, Model, Needs, Workload

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmq.layers import LayerChange
    from llmq.predictors import Predictor
    from llmq.text.sizing.network import TextSketch

PROBED = 16
"""Tokens of the probe that tells whether two models are equal."""


class LanguageModel(Model):
    kind: ClassVar[str] = "causal-lm"
    suite: ClassVar[str] = "text-quick"

    weights: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def sketch(self) -> "TextSketch":
        """The tensors and widths that the configuration tells."""
        from dataclasses import replace

        from llmq.text.sizing.network import sketch_of

        self.check_trust()
        untouched = sketch_of(self.weights, self.dtype)
        return replace(untouched, base=untouched)

    def download(self) -> str:
        from llmq.text.sizing.network import download

        return download(self.weights)

    def file_bytes(self) -> int:
        from llmq.text.weights import parts_of

        return bytes_of(parts_of(at_home(self.weights))) if self.weights.endswith(".gguf") else 0

    def smaller(self) -> "Iterator[Mapping[str, object]]":
        """16 bits a weight instead of 32."""
        if self.dtype == "float32":
            yield {"dtype": "bfloat16"}

    def open(self, artifact: Artifact, device: str) -> Loaded:
        """The module in evaluation mode, with the adapter of the artifact if there is one, and the tokenizer."""
        from llmq.text.bnb_layers import keep_unpacked, reads_weights

        self.check_trust()
        if artifact.runtime == "openvino":
            from llmq.text.graph.opening import load_graph

            return load_graph(artifact)
        module = self._opened(artifact, device)
        if artifact.adapter:
            module = with_adapter(module, artifact.adapter).eval()
            if reads_weights(module):  # weights that bitsandbytes repacks cannot be read
                keep_unpacked(module)
        tokenizer = load_tokenizer(artifact.weights)
        if placeholders := check_fits(module, tokenizer):  # special tokens that have no embedding
            refuse_ids_beyond(module, placeholders)
        if device == "cpu" and artifact.packed and not artifact.adapter:
            from llmq.text.captured import capture_steps

            capture_steps(module)
        return Loaded(module, tokenizer, device, artifact)

    def _opened(self, artifact: Artifact, device: str) -> "PreTrainedModel":
        if artifact.runtime == "gguf":
            from llmq.text.gguf.opening import load_gguf

            return load_gguf(artifact.weights, self.dtype, device)
        return load_causal_lm(artifact.weights, self.dtype, device)

    def runs_in(self, loaded: Loaded) -> str:
        """OpenVINO at the precision of the stage, which its quality is measured in as well as its speed."""
        return f"openvino at {loaded.module.precision}" if loaded.artifact.runtime == "openvino" else ""

    def check_fits(self, artifact: Artifact, needs: Mapping[str, Needs]) -> None:
        """Raise `UserError` for a tokenizer of another model, or for needs beyond the positions of the model."""
        self.check_trust()
        tokenizer = load_tokenizer(artifact.weights)
        check_fits(without_weights(artifact.weights), tokenizer, needs)

    def probe(self, module: "PreTrainedModel") -> "Sequence[Tensor]":
        """The logits `[1, tokens, vocabulary]` after tokens from all over the vocabulary."""
        import torch

        rows = len(module.get_input_embeddings().weight)  # of (vocabulary, d)
        tokens = torch.arange(PROBED, device=module.device)[None] * (rows // PROBED or 1) % rows  # (1, tokens)
        with torch.inference_mode():
            # In evaluation mode: dropout would make two equal models differ.
            return [module.eval()(input_ids=tokens, use_cache=False).logits.cpu()]

    def skeleton(self, artifact: Artifact, device: str) -> Skeleton:
        """The layers of an artifact for a step that changes weights, with one block in memory at a time."""
        self.check_trust()
        return Skeleton(artifact.weights, self.dtype, device)

    def rewrite(
        self,
        source: Skeleton,
        folder: Path,
        change: "LayerChange[BaseModel]",
        windows: Sequence[Sequence[int]],
        sequential: bool,
    ) -> list[str]:
        """Write a model with its layers changed to `folder`. Returns the layers that no calibration token reached."""
        from llmq.text.blockwise import rewrite

        return rewrite(source, folder, change, windows, sequential)

    def clocks(self, loaded: Loaded, workload: Workload) -> Iterable[Clock]:
        """Clocks for one prefill of `prompt_tokens` and one decode of `new_tokens`."""
        from llmq.text.generation import clocks

        return clocks(loaded, workload.task, workload.prompt_tokens, workload.new_tokens, workload.rounds)

    def predictor(self) -> "type[Predictor]":
        from llmq.text.answering import Answering

        return Answering
