"""Full static int8 of an image model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError, did_you_mean
from llmq.models.vision import KINDS
from llmq.plugin import DataWord
from llmq.types import Context, Split, Step

JUDGED = 16
"""Calibration inputs that the result is judged on."""


class Int8(Step):
    """Int8 weights and activations (Jacob et al. 2018), their ranges seen on calibration data, by NNCF.

    Works on the exported graph; OpenVINO runs it, here and elsewhere. What follows the network, such as a detector's
    boxes, stays in float.
    """

    suits: ClassVar[frozenset[str]] = KINDS
    writes: ClassVar[float] = 1.5  # the float graph first, then that in int8
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool]] = {"packed": True}

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
    ignored: tuple[str, ...] = Field((), description="layers kept in float: names in the network, or their beginnings")
    model_type: Literal["transformer"] | None = Field(None, description="transformer: for networks with attention")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for a network that needs data and has none, or cannot see it."""
        self._inputs(base, self._split(), 1, 0)

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Export, calibrate, and write the quantized graph."""
        from llmq.environment import library_version
        from llmq.quantize import apart
        from llmq.quantize.exporting import quantized_stage

        split = self._split()
        inputs = self._inputs(artifact, split, self.samples, context.seed)
        about: dict[str, Any] = {"samples": len(inputs), "seed": context.seed}
        if self.data is not None and split is not None:
            about["data"] = {"word": self.data.word, "sha256": split.sha256}
        notes = {"nncf": library_version("nncf"), "calibration": about}
        return quantized_stage(
            self,
            artifact,
            folder,
            lambda graph: apart.changed(self, artifact.model, graph, inputs),
            inputs[:JUDGED],
            notes=notes,
        )

    def _split(self) -> Split | None:
        return self.data.read() if self.data is not None else None

    def _inputs(self, artifact: Artifact, split: Split | None, samples: int, seed: int) -> list[Any]:
        model: Any = artifact.model
        inputs = list(model.calibration(split, samples, seed))
        if not inputs:
            raise UserError("the calibration data has no training image")
        return inputs

    def quantized(self, graph: Any, inputs: list[Any]) -> Any:
        """The graph with int8 weights and activations, their ranges those of `inputs`."""
        from llmq.quantize.exporting import nncf, quietly
        from llmq.quantize.unfed import unfed_layers

        library = nncf()
        names = ignored_names([op.get_friendly_name() for op in graph.get_ops()], self.ignored)
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
    from llmq.quantize.layer_names import operations_of

    layers = dict(operations_of(operations))
    found = []
    for wanted in ignored:
        its = [name for name, layer in layers.items() if f"{layer}.".startswith(f"{wanted}.")]
        if not its:
            raise UserError(f"ignored: the network has no layer {wanted!r}{did_you_mean(wanted, set(layers.values()))}")
        found += its
    return found
