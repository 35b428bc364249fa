"""Weights in float16, half the file; computed in float32, or in bfloat16 where the processor has it.

The stage is a graph that OpenVINO opens.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.types import Context, Step
from llmq.vision.family import IMAGE_MODELS, ImageModel

if TYPE_CHECKING:
    from openvino import Model as Graph

    from llmq.sketch import Sketch, Work


class Float16(Step[ImageModel]):
    suits = IMAGE_MODELS
    runtimes: ClassVar[Collection[str]] = frozenset({"torch", "openvino"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"packed": True, "runtime": "openvino"}

    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 is up to twice as fast on processors that have it, and less exact"
    )

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The exported graph; only weights are rounded."""
        from llmq.vision.sizing import as_graph, as_images, exporting

        source = as_images(before)
        made = as_graph(source, 16)
        return made, exporting(source, made)

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        from llmq.vision.exporting import quantized_stage

        return quantized_stage(
            self,
            artifact,
            folder,
            _unchanged,
            compute_dtype=self.compute_dtype,
            float16=True,
        )


def _unchanged(graph: "Graph") -> "Graph":
    return graph  # the writer converts the constants to float16
