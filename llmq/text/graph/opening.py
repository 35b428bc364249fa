"""Opening a language model that OpenVINO runs, as a folder with its graph and the files of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq import trust
from llmq.openvino_runtime import LANGUAGE_GRAPH
from llmq.text.formats import check_code
from llmq.text.graph.module import GraphModel
from llmq.text.opening import without_weights
from llmq.text.tokenizer import check_fits, load_tokenizer
from llmq.types import Loaded

if TYPE_CHECKING:
    from llmq.artifact import Artifact


def load_graph(artifact: Artifact) -> Loaded:
    """The graph as a module on the processor, and the tokenizer."""
    from transformers import AutoConfig, GenerationConfig

    check_code(artifact.weights)
    tokenizer = load_tokenizer(artifact.weights)
    placeholders = check_fits(without_weights(artifact.weights), tokenizer)
    config = AutoConfig.from_pretrained(artifact.weights, trust_remote_code=trust.remote_code())
    module = GraphModel(artifact.weights / LANGUAGE_GRAPH, config, refused=placeholders)
    if (artifact.weights / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(artifact.weights)
    return Loaded(module, tokenizer, "cpu", artifact)
