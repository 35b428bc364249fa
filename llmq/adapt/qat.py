"""Trains a network with the rounding of int8, or of 4-bit weights, in place (quantization-aware training), by NNCF.

Ranges begin as calibration finds them. The float network before this step teaches: no label is read, outputs are
compared. The stage is a graph for OpenVINO, as that of `quantize.int8` is. A training that is killed and resumed ends
with the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.types import Context, Loaded
from llmq.vision.family import ImageModel, Training
from llmq.vision.taught import UNITS, Taught

if TYPE_CHECKING:
    from openvino import Model as Graph
    from torch import Tensor

    from llmq.sketch import Sketch, Work
    from llmq.types import JsonObject, Samples
    from llmq.vision.images import Example

JUDGED = 16
"""Calibration inputs that the result is judged on."""
SLOWER, WRAPPED = 2.0, 10.0
"""Steps of a float training that one with rounding in place takes the time of, and seconds of NNCF's around them."""


class Qat(Taught):
    suits: ClassVar[frozenset[str]] = frozenset({"classifier", "detector", "super-resolution"})
    leaves: ClassVar[Mapping[str, bool | str]] = {"packed": True, "runtime": "openvino"}

    max_steps: PositiveInt = 600
    bits: Literal[4, 8] = Field(8, description="of the weights; activations have 8")
    samples: PositiveInt = Field(100, description="images that ranges are taken from before the training")
    preset: Literal["performance", "mixed"] = Field(
        "performance", description="symmetric activations; mixed: asymmetric ones, which fit lopsided values better"
    )
    ignored: tuple[str, ...] | None = Field(
        None, description="layers kept in float: names in the network, or their beginnings; the family's if unset"
    )
    model_type: Literal["transformer"] | None = Field(None, description="transformer: for networks with attention")

    def check_base(self, base: Artifact[ImageModel]) -> None:
        self.check_taught(base)

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The graph of integers; the network is trained beside the float one, and both are exported."""
        from llmq.sketch import Work, times
        from llmq.vision.graph_sizing import TRACED_NODE
        from llmq.vision.sizing import as_graph, as_images, exporting

        source = as_images(before)
        assert source.model
        made = as_graph(replace(source, node_text=TRACED_NODE), self.bits, activations=True)
        learned = times(self.work(before, self._own(source.model)), SLOWER).plus(Work(seconds=WRAPPED))
        return made, learned.plus(exporting(source, made, self.samples, self.data.expected() if self.data else None))

    def _own(self, model: ImageModel) -> Training:
        unit = UNITS[self.distance_of(model.kind)]
        return replace(model.training, loss_unit=unit, weight_decay=0.0, autocast=False)

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        """Train from the last checkpoint in `folder` if there is one, and write the graph there."""
        from torch import Tensor

        from llmq.environment import library_version
        from llmq.vision.exporting import chances, quantized_stage

        model = artifact.model
        split, _, _ = self.examples(model)
        inputs = list(model.calibration(split, self.samples, context.seed))
        graph, history = self._trained(artifact, inputs, folder, context)
        about = {"samples": len(inputs), "seed": context.seed}
        data = {} if split is None or self.data is None else {"word": self.data.word, "sha256": split.sha256}
        notes = {"nncf": library_version("nncf"), "bits": self.bits, "calibration": {**about, "data": data}, **history}
        # A divergence sees chances alone: logits that learned by it may lie anywhere.
        meaning = chances if self.distance_of(model.kind) == "kl" else Tensor.float
        return quantized_stage(self, artifact, folder, lambda _: graph, inputs[:JUDGED], notes=notes, meaning=meaning)

    def _trained(
        self, artifact: Artifact[ImageModel], inputs: "list[Tensor]", folder: Path, context: Context
    ) -> "tuple[Graph, JsonObject]":
        """The graph of the trained network, and the notes of the training."""
        from llmq.reopened import Start, meant
        from llmq.statistics.figures import stretches
        from llmq.vision.fake_quantized import graph_of, rounding
        from llmq.vision.loop import Run
        from llmq.vision.teaching import Lessons

        model = artifact.model
        split, examples, watched = self.examples(model)
        alike = stretches(len(split.held_out))[: len(watched)] if split and split.neighbours else None
        training = self.settings(artifact, context, self._own(model))
        ignored = model.floats if self.ignored is None else self.ignored
        with artifact.open("cpu") as loaded, artifact.open(context.device) as teacher:
            deployed = model.deployed(loaded.module)
            network = rounding(deployed, inputs, self.bits, self.preset, ignored, self.model_type is not None)
            network.to(context.device)
            distance = self.distance_of(model.kind)
            lessons = Lessons(
                model, teacher.module, distance, self.temperature, 0.0, self.features, self.feature_weight
            )
            start = Start(model, network)
            learning = Loaded(network, loaded.processor, context.device, artifact)
            alone = _seen(model, learning, watched, alike)  # a checkpoint is opened later, by `train`
            history = Run(lessons, learning, training, folder).train(examples, watched)
            told = _told(alone, _seen(model, learning, watched, alike))
            moved = start.moved(network, meant(model, network))
            about = {"teacher": "the float network before", "distance": distance, **history, **training.noted()}
            return graph_of(network, model), {"training": about, **told, **moved}


def _seen(
    model: ImageModel, loaded: Loaded, watched: "Sequence[Example]", alike: tuple[int, ...] | None
) -> "tuple[str, Samples] | None":
    """The first metric of the kind on the held-out images that are watched; None for too few, or without labels.

    `alike` numbers the stretch of neighbouring slices that each image lies in.
    """
    from llmq.statistics.estimates import FEWEST
    from llmq.vision.accuracy_control import METRICS

    if len(watched) < FEWEST or model.not_watchable(watched):
        return None
    name, metric = next(iter(METRICS[model.kind].items()))
    loaded.module.eval()
    try:
        return name, replace(metric(model, loaded, watched), clusters=alike)
    except UserError:  # boxes in too few of the images
        return None


def _told(alone: "tuple[str, Samples] | None", trained: "tuple[str, Samples] | None") -> "JsonObject":
    """The gain of the training over the rounding alone, as a finding of the stage."""
    from llmq.statistics.estimates import difference, figure

    if alone is None or trained is None:
        return {}
    (name, before), (_, after) = alone, trained
    gain, (was, now) = difference(after, before), (float(figure(samples)[0]) for samples in (before, after))
    told = f" ({gain.value:+.3f}, 95 % {gain.low:+.3f} to {gain.high:+.3f})" if gain else ""
    seen = f"{name} {was:.3f} on {len(before.values)} held-out images"
    return {"finding": f"the rounding alone has {seen}, and {now:.3f} after the training{told}"}
