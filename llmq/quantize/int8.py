"""Int8 weights and activations (Jacob et al. 2018), their ranges seen on calibration data, by NNCF.

The input is the exported graph, and OpenVINO runs the result. Work after the network, such as making a detector's
boxes, stays in float.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError, did_you_mean
from llmq.plugin import DataWord
from llmq.types import Context, Split, Step
from llmq.vision.family import IMAGE_MODELS, ImageModel

if TYPE_CHECKING:
    from openvino import Model as Graph
    from torch import Tensor

    from llmq.sketch import Sketch, Work

JUDGED = 16
"""Calibration inputs that the result is judged on."""


class Int8(Step[ImageModel]):
    suits = IMAGE_MODELS
    runtimes: ClassVar[Collection[str]] = frozenset({"torch", "openvino"})
    writes: ClassVar[float] = 1.5  # the float graph first, then the int8 graph
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"packed": True, "runtime": "openvino"}

    data: DataWord | None = Field(None, description="its training images calibrate; a gan needs none, it draws latents")
    samples: PositiveInt = Field(100, description="images, or latents, that ranges are taken from")
    preset: Literal["performance", "mixed"] = Field(
        "performance", description="symmetric activations; mixed: asymmetric ones, which fit lopsided values better"
    )
    fast_bias_correction: bool = Field(False, description="true: seconds instead of up to a minute, and less exact")
    overflow_fix: Literal["first_layer_only", "enable", "disable"] = Field(
        "first_layer_only",
        description="layers whose weights take 7 bits, so that no processor without VNNI overflows; disable: none",
    )
    ignored: tuple[str, ...] | None = Field(
        None, description="layers kept in float: names in the network, or their beginnings; the family's if unset"
    )
    model_type: Literal["transformer"] | None = Field(None, description="transformer: for networks with attention")

    def check_base(self, base: Artifact[ImageModel]) -> None:
        self._inputs(base, self._split(), 1, 0)

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The exported graph; calibration runs the float graph."""
        from llmq.vision.sizing import as_graph, as_images, exporting

        source = as_images(before)
        made = as_graph(source, 8, activations=True)
        return made, exporting(source, made, self.samples)

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        from llmq.environment import library_version
        from llmq.vision import apart
        from llmq.vision.exporting import quantized_stage

        split = self._split()
        inputs = self._inputs(artifact, split, self.samples, context.seed)
        ignored = artifact.model.floats if self.ignored is None else self.ignored
        step = self.model_copy(update={"ignored": ignored})
        about: dict[str, object] = {"samples": len(inputs), "seed": context.seed}
        if self.data is not None and split is not None:
            about["data"] = {"word": self.data.word, "sha256": split.sha256}
        kept = {"float_layers": list(ignored)} if ignored else {}
        return quantized_stage(
            self,
            artifact,
            folder,
            lambda graph: apart.changed(step, artifact.model.title, graph, inputs),
            inputs[:JUDGED],
            notes={"nncf": library_version("nncf"), "calibration": about, **kept},
        )

    def _split(self) -> Split | None:
        return self.data.read() if self.data is not None else None

    def _inputs(self, artifact: Artifact[ImageModel], split: Split | None, samples: int, seed: int) -> "list[Tensor]":
        if not (inputs := list(artifact.model.calibration(split, samples, seed))):
            raise UserError("the calibration data has no training image")
        return inputs

    def quantized(self, graph: "Graph", inputs: "list[Tensor]") -> "Graph":
        """The graph with int8 weights and activations, their ranges those of `inputs`."""
        from llmq.openvino_runtime import quietly
        from llmq.vision.exporting import nncf
        from llmq.vision.graph_layers import unfed_layers

        library = nncf()
        names = ignored_names([op.get_friendly_name() for op in graph.get_ops()], self.ignored or ())
        names += [name for name in unfed_layers(graph) if name not in names]
        transformer = library.ModelType.TRANSFORMER if self.model_type else None
        advanced = library.AdvancedQuantizationParameters(overflow_fix=library.OverflowFix(self.overflow_fix))
        with quietly():
            return library.quantize(
                graph,
                library.Dataset(inputs, lambda x: x.numpy()),
                preset=library.QuantizationPreset(self.preset),
                subset_size=len(inputs),
                fast_bias_correction=self.fast_bias_correction,
                model_type=transformer,
                advanced_parameters=advanced,
                ignored_scope=library.IgnoredScope(names=names, validate=False) if names else None,
            )


def ignored_names(operations: list[str], ignored: tuple[str, ...]) -> list[str]:
    """The operations of the layers that `ignored` names. Raises `UserError` for a name that the network lacks."""
    from llmq.vision.graph_layers import operations_of

    layers = dict(operations_of(operations))
    names: list[str] = []
    for wanted in ignored:
        matching = [name for name, layer in layers.items() if f"{layer}.".startswith(f"{wanted}.")]
        if not matching:
            raise UserError(f"ignored: the network has no layer {wanted!r}{did_you_mean(wanted, set(layers.values()))}")
        names += matching
    return names
