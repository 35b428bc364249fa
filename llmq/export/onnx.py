"""Writes an image model as one ONNX file, which ONNX Runtime opens to the same outputs.

Float networks stay float32, for any batch size, and any height and width where the family takes any; Faster R-CNN, and
a graph that somebody exported for one image, take one image at a time, which the stage notes. A stage of
`quantize.int8` keeps its int8 weights and its ranges as QuantizeLinear and DequantizeLinear; int8 weights of
`quantize.dynamic` and float16 weights of `quantize.float16` stay as they are stored, and are computed in float32.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmq.artifact import Artifact
from llmq.types import Context, Step
from llmq.vision.family import IMAGE_MODELS, ImageModel

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class Onnx(Step[ImageModel]):
    suits = IMAGE_MODELS
    runtimes: ClassVar[Collection[str]] = frozenset({"torch", "openvino"})
    requires: ClassVar[Mapping[str, bool]] = {"adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"runtime": "onnx"}

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The graph with its weights as they are stored; the description of the graph is estimated."""
        from dataclasses import replace

        from llmq.vision.sizing import as_graph, as_images, exporting

        source = as_images(before)
        made = source if source.runtime != "torch" else as_graph(source, 32)
        return replace(made, runtime="onnx"), exporting(source, made)

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        from llmq.vision.onnx.export import onnx_stage

        return onnx_stage(self, artifact, folder)
