"""Int8 weights of an image model, without calibration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.models.vision import KINDS
from llmq.types import Context, Step


class Dynamic(Step):
    """Int8 weights, symmetric, a scale for each output channel; activations stay in float, so no data is needed.

    Every convolution, transposed convolution and linear layer, by NNCF. The stage is a graph that OpenVINO opens, here
    and elsewhere; it makes weights float again as it opens it, so the file shrinks and the memory does not.
    """

    suits: ClassVar[frozenset[str]] = KINDS
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool]] = {"packed": True}

    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="bfloat16 is up to twice as fast on processors that have it; others take float32"
    )

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Export, and round the weights of the graph."""
        from llmq.environment import library_version
        from llmq.quantize import apart
        from llmq.quantize.exporting import quantized_stage

        model: Any = artifact.model
        return quantized_stage(
            self,
            artifact,
            folder,
            lambda graph: apart.changed(self, model, graph, [model.example(1)]),
            compute_dtype=self.compute_dtype,
            notes={"nncf": library_version("nncf")},
        )

    def quantized(self, graph: Any, inputs: list[Any]) -> Any:
        """The graph with int8 weights; no input is looked at."""
        from llmq.quantize.exporting import nncf, quietly
        from llmq.quantize.unfed import unfed_layers

        library, names = nncf(), unfed_layers(graph)
        with quietly():
            return library.compress_weights(
                graph,
                mode=library.CompressWeightsMode.INT8_SYM,
                ignored_scope=library.IgnoredScope(names=names, validate=False) if names else None,
            )
