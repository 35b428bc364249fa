"""Int8 weights and activations (Jacob et al. 2018), their ranges seen on calibration data, by NNCF.

The input is the exported graph, and OpenVINO runs the result. Work after the network, such as making a detector's
boxes, stays in float. With `accuracy_drop` the layers that harm the outputs most go back to float, by NNCF's accuracy
control, until the 95 % interval of the drop lies within the bound.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError, did_you_mean
from llmq.plugin import DataWord
from llmq.types import Context, Split, Step
from llmq.vision.family import IMAGE_MODELS, ImageModel

if TYPE_CHECKING:
    from openvino import Model as Graph
    from torch import Tensor

    from llmq.sketch import Sketch, Work
    from llmq.types import JsonObject

JUDGED = 16
"""Calibration inputs that the result is judged on."""


def _points(value: object) -> object:
    """`0.3pt` as 0.003."""
    if isinstance(value, str) and value.strip().endswith("pt"):
        return f"{value.strip().removesuffix('pt').strip()}e-2"
    return value


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
    accuracy_drop: dict[str, Annotated[PositiveFloat, BeforeValidator(_points)]] | None = Field(
        None,
        min_length=1,
        description="`{top1: 0.3pt}`, `{map: 0.01}`, `{map50: …}` or `{psnr: …}` (dB): layers go back to float until "
        "the 95 % interval of the drop lies within it",
    )
    accuracy_data: DataWord | None = Field(
        None, description="its training images tell the drop; those of data that calibrate nothing if unset"
    )
    accuracy_samples: PositiveInt = Field(2000, description="images at most that tell the drop")

    def check(self) -> None:
        super().check()
        for name in ("accuracy_data", "accuracy_samples"):
            if self.accuracy_drop is None and getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(f"{name} is read for accuracy_drop alone; set that, or leave it out")

    def check_base(self, base: Artifact[ImageModel]) -> None:
        self._inputs(base, self._split(), 1, 0)
        if self.accuracy_drop is not None:
            from llmq.vision.accuracy_control import check_bounds

            check_bounds(base.model.kind, self.accuracy_drop)
            self._judging(base, 0)

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The exported graph; calibration runs the float graph."""
        from llmq.vision.sizing import as_graph, as_images, exporting

        source = as_images(before)
        made = as_graph(source, 8, activations=True)
        return made, exporting(source, made, self.samples, self.data.expected() if self.data else None)

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
        notes: dict[str, object] = {"nncf": library_version("nncf"), "calibration": about, **kept}
        judging = self._judging(artifact, context.seed) if self.accuracy_drop is not None else None

        def change(graph: "Graph") -> "Graph":
            made = apart.changed(step, artifact.model.title, graph, inputs, judging)
            if judging is not None:
                notes["accuracy_drop"] = {"judged_on": judging["what"], **told_by(made)}
            return made

        return quantized_stage(self, artifact, folder, change, inputs[:JUDGED], notes=notes)

    def _judging(self, artifact: Artifact[ImageModel], seed: int) -> "JsonObject":
        """The model, the data and the images that tell the drop, as another process needs them.

        They are training images that calibrate nothing, so that the held-out ones of a report stay unseen. Raises
        `UserError` for images without labels, and for so few that nothing is told.
        """
        import numpy as np

        from llmq.plugin import entry
        from llmq.statistics.estimates import FEWEST

        data: Any = self.accuracy_data or self.data
        if data is None:
            raise UserError("accuracy_drop needs accuracy_data, images with labels that tell the drop")
        split, calibrates = data.read(), self._split()
        artifact.model.check_split(split)
        if split.shape == "image":
            raise UserError(f"accuracy_drop: the images of {data.word} have no labels, and no drop is told from them")
        order = np.random.default_rng(seed).permutation(len(split.train))  # as `calibration` draws them
        shared = calibrates is not None and calibrates.sha256 == split.sha256
        rows = order[self.samples if shared else 0 :][: self.accuracy_samples].tolist()
        used = ", without those that calibrated" if shared else ""
        if len(rows) < FEWEST:
            raise UserError(
                f"accuracy_drop: {len(rows)} training images of {data.word}{used}, and no drop is told from fewer than "
                f"{FEWEST}; take fewer samples, more accuracy_samples, or other accuracy_data"
            )
        return {
            "model": {artifact.model.word: artifact.model.model_dump(mode="json")},
            "data": entry(data, whole=True),
            "rows": rows,
            "seed": seed,
            "what": f"{len(rows)} training images of {data.word}{used}, sha256 {split.sha256[:12]}",
        }

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

        library = nncf()
        advanced = library.AdvancedQuantizationParameters(overflow_fix=library.OverflowFix(self.overflow_fix))
        with quietly():
            return library.quantize(
                graph,
                library.Dataset(inputs, lambda x: x.numpy()),
                advanced_parameters=advanced,
                **self._settings(graph, len(inputs)),
            )

    def restored(self, graph: "Graph", inputs: "list[Tensor]", judging: "JsonObject") -> "Graph":
        """The graph as `quantized` makes it, with layers back in float until the drop lies within `accuracy_drop`.

        `judging` is what `_judging` says. The graph carries the account, which `told_by` reads.
        """
        import numpy as np

        from llmq import plugin
        from llmq.openvino_runtime import core, quietly
        from llmq.statistics.figures import stretches
        from llmq.vision.accuracy_control import ANSWER, Judge, rounded_layers
        from llmq.vision.exporting import nncf

        library = nncf()
        model: Any = plugin.build(judging["model"])
        data: Any = plugin.build(judging["data"])
        split = model.numbered(data.read())
        train, rows = split.train, judging["rows"]
        stretch = stretches(len(train)) if split.neighbours else None
        examples = [train[row].seen(np.random.default_rng([judging["seed"], row])) for row in rows]
        clusters = tuple(stretch[row] for row in rows) if stretch else None
        judge = Judge(model, self.accuracy_drop or {}, examples, clusters)
        advanced = library.AdvancedQuantizationParameters(overflow_fix=library.OverflowFix(self.overflow_fix))
        for i, output in enumerate(graph.outputs):  # NNCF looks outputs up by name, and these may have none
            output.get_tensor().set_names({f"output_{i}"})
        with TemporaryDirectory() as folder, quietly():
            restoring = library.AdvancedAccuracyRestorerParameters(num_ranking_workers=1, intermediate_model_dir=folder)
            made = library.quantize_with_accuracy_control(
                graph,
                library.Dataset(inputs, lambda x: x.numpy()),
                library.Dataset(list(range(len(judge.examples))), judge.input),
                judge,
                max_drop=1.0,  # of what the judge answers: shares of the bounds
                advanced_quantization_parameters=advanced,
                advanced_accuracy_restorer_parameters=restoring,
                **self._settings(graph, len(inputs)),
            )
            layers = rounded_layers(core().read_model(Path(folder) / "intermediate_model.xml"))
        compiled = core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        made.set_rt_info(json.dumps(judge.told(compiled, made, layers)), ANSWER)
        return made

    def _settings(self, graph: "Graph", samples: int) -> "JsonObject":
        """The settings of NNCF, the same with and without accuracy control."""
        from llmq.vision.exporting import nncf
        from llmq.vision.graph_layers import unfed_layers

        library = nncf()
        names = ignored_names([op.get_friendly_name() for op in graph.get_ops()], self.ignored or ())
        names += [name for name in unfed_layers(graph) if name not in names]
        return {
            "preset": library.QuantizationPreset(self.preset),
            "subset_size": samples,
            "fast_bias_correction": self.fast_bias_correction,
            "model_type": library.ModelType.TRANSFORMER if self.model_type else None,
            "ignored_scope": library.IgnoredScope(names=names, validate=False) if names else None,
        }


def told_by(graph: "Graph") -> "JsonObject":
    """The account of accuracy control that a graph carries."""
    from llmq.vision.accuracy_control import ANSWER

    account: JsonObject = json.loads(graph.get_rt_info(ANSWER).astype(str))
    return account


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
