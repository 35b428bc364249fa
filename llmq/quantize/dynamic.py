"""Int8 weights, symmetric, a scale for each output channel; activations stay in float, so no data is needed.

NNCF quantizes every convolution, transposed convolution and linear layer. The stage is a graph for OpenVINO, which
turns weights into floats as it opens the graph: the file shrinks, the memory does not.
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
    from torch import Tensor

    from llmq.sketch import Sketch, Work


class Dynamic(Step[ImageModel]):
    suits = IMAGE_MODELS
    runtimes: ClassVar[Collection[str]] = frozenset({"torch", "openvino"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"packed": True, "runtime": "openvino"}

    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="bfloat16 is up to twice as fast on processors that have it; others take float32"
    )

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The exported graph; only weights are rounded."""
        from llmq.vision.sizing import as_graph, as_images, exporting

        source = as_images(before)
        made = as_graph(source, 8)
        return made, exporting(source, made)

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        from llmq.environment import library_version
        from llmq.vision import apart
        from llmq.vision.exporting import quantized_stage

        model = artifact.model
        return quantized_stage(
            self,
            artifact,
            folder,
            lambda graph: apart.changed(self, model.title, graph, [model.example(1)]),
            compute_dtype=self.compute_dtype,
            notes={"nncf": library_version("nncf")},
        )

    def quantized(self, graph: "Graph", inputs: "list[Tensor]") -> "Graph":
        """The graph with int8 weights; they depend on no input."""
        from llmq.openvino_runtime import quietly
        from llmq.vision.exporting import nncf
        from llmq.vision.graph_layers import unfed_layers

        library, names = nncf(), unfed_layers(graph)
        with quietly():
            return library.compress_weights(
                graph,
                mode=library.CompressWeightsMode.INT8_SYM,
                ignored_scope=library.IgnoredScope(names=names, validate=False) if names else None,
            )
