"""Writes a language model as a graph that OpenVINO GenAI and OpenVINO Model Server open, with keys and values inside.

Packed weights of GPTQ, AWQ and RTN keep their codes (2, 3 and 4 bits as u4, 8 as u8), all other matrices become
float16; the weights of bitsandbytes do, too. The graph must give the logits that torch gives in float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.terminal import say
from llmq.text.family import LanguageModel
from llmq.types import Context, Step

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class OpenVino(Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"runtime": "openvino"}

    precision: Literal["f32", "bf16", "f16", "int8"] = Field(
        "f32",
        description="that every task then measures: exact; or bf16 or f16 where the processor has it; or int8 "
        "activations and 8-bit keys and values, OpenVINO's own choice for speed",
    )

    def check_base(self, base: Artifact[LanguageModel]) -> None:
        from llmq.text.graph.stage import check_network

        check_network(base.weights)

    def space(self, artifact: Artifact[LanguageModel]) -> int:
        from llmq.text.formats import packed_as

        is_nf4 = (packed_as(artifact.weights) or {}).get("quant_method") == "bitsandbytes"
        return super().space(artifact) * (4 if is_nf4 else 1)  # from 4 bits to 16

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """Codes as they were, scales and all other matrices in float16; the text of the graph is estimated."""
        from dataclasses import replace

        from llmq.sketch import BYTES, Work
        from llmq.text.sizing import packing, work
        from llmq.text.sizing.network import as_text

        source = as_text(before)
        parts = tuple(packing.in_graph(part) for part in source.parts)
        described = work.GRAPH_OF_BLOCK * len(source.blocks) + work.TOKEN_IN_GGUF * source.vocabulary
        made = replace(
            source,
            parts=parts,
            dtype="float32" if self.precision == "f32" else source.dtype,
            runtime="openvino",
            more_on_disk=described,
            not_in_order="the graph's text is estimated",
        )
        # All weights are traced in float32 beside the stage; then come the graph, and what OpenVINO makes of it.
        # Embeddings and head are in float32 in each.
        outside = 4 * source.outside_bytes // BYTES[source.dtype]
        memory = source.in_memory + 4 * source.parameters + 2 * made.in_memory + 3 * outside
        return made, Work(memory, {"copy": 20.0 * source.in_memory}, 10 * work.PROBES)

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        from llmq.text.graph.stage import write_stage

        notes = write_stage(artifact, folder, self.precision)
        if told := notes.get("left_out"):
            say(f"  left out: {told}")
        packed = bool(notes["packed_layers"])
        return artifact.then(self, weights=folder, runtime="openvino", packed=packed, notes=notes)
