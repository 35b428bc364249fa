"""The drop of a metric from a float graph to a quantized one, on labelled images, as NNCF's accuracy control asks it.

NNCF stops by points; a `Judge` answers with the upper end of a 95 % interval over pairs of images, so that NNCF takes
layers back to float until the interval lies within the bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.statistics.estimates import difference, figure
from llmq.types import JsonObject, Loaded, Samples
from llmq.vision.average_precision import Match, influences, mean_average_precision

if TYPE_CHECKING:
    from numpy import ndarray
    from openvino import CompiledModel, Node
    from openvino import Model as Graph

    from llmq.vision.images import Example

ANSWER = ["llmq", "accuracy_drop"]
"""The place of a judge's account in the run-time information of a graph."""
GROUPS = 256
"""Groups of images of the jackknife."""


def top1(model: Any, loaded: Loaded, examples: Sequence[Example]) -> Samples:
    """1 for each image whose largest logit is that of the label, else 0."""
    answers = model.logits(loaded, [example.image for example in examples]).argmax(1).tolist()
    return Samples(tuple(float(a == e.label) for a, e in zip(answers, examples, strict=True)))


def precision(model: Any, loaded: Loaded, examples: Sequence[Example], thresholds: slice) -> Samples:
    """COCO's mean average precision as the influence of each group of images."""
    found = model.detect(loaded, [example.image for example in examples])
    matches = [Match.of(e, d) for e, d in zip(examples, found, strict=True)]
    matches = [Match(m.labels, m.scores, m.hits[thresholds], m.ignored[thresholds], m.wanted) for m in matches]
    groups = min(GROUPS, len(matches))
    each = influences(matches, mean_average_precision(matches), groups) if groups > 1 else None
    if each is None:
        raise UserError("accuracy_drop: too few of its images have boxes; take more, or other data")
    return Samples(tuple(map(float, each)))


def psnr(model: Any, loaded: Loaded, examples: Sequence[Example]) -> Samples:
    """The PSNR of each enlarged image in dB, of bytes."""
    from llmq.vision.degrade import to_uint8
    from llmq.vision.image_quality import capped_psnr

    made = (to_uint8(model.upscale(loaded, example.image)) for example in examples)
    return Samples(tuple(capped_psnr(image, e.high, 255) for image, e in zip(made, examples, strict=True)))


METRICS: Mapping[str, Mapping[str, Any]] = {
    "classifier": {"top1": top1},
    "detector": {
        "map": partial(precision, thresholds=slice(None)),
        "map50": partial(precision, thresholds=slice(0, 1)),
    },
    "super-resolution": {"psnr": psnr},
}
"""The metrics that may decide, by kind; of each, more is better."""


def check_bounds(kind: str, bounds: Mapping[str, float]) -> None:
    """Raise `UserError` for a metric that is none of a kind of models."""
    known = METRICS.get(kind, {})
    if odd := [name for name in bounds if name not in known]:
        raise UserError(f"accuracy_drop: {odd[0]!r} is no metric of a {kind}; {' or '.join(known) or 'it has none'}")


class Ran:
    """A compiled graph as a module: a float tensor in, a tensor or a tuple of tensors out."""

    def __init__(self, compiled: CompiledModel) -> None:
        self.compiled = compiled
        self.alone = compiled.inputs[0].partial_shape[0].is_static  # a graph for one image, as somebody exported it

    def __call__(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        parts = [self.outputs(x.numpy()) for x in (inputs.split(1) if self.alone else [inputs])]  # type: ignore[no-untyped-call]
        joined = [torch.from_numpy(each[0] if len(each) == 1 else _joined(each)) for each in zip(*parts, strict=True)]
        return joined[0] if len(joined) == 1 else tuple(joined)

    def outputs(self, x: ndarray) -> list[ndarray]:
        """The outputs for an input, in new memory."""
        return [output.copy() for output in self.compiled(x).values()]


def _joined(parts: Sequence[ndarray]) -> ndarray:
    import numpy as np

    made: ndarray = np.concatenate(parts)
    return made


@dataclass
class Judge:
    """The metrics of one graph after another beside the float graph, which comes first, on the same images."""

    model: Any
    bounds: Mapping[str, float]
    examples: Sequence[Example]
    clusters: tuple[int, ...] | None = None
    """The stretch of neighbouring slices that each example lies in, as slices of one volume are alike."""
    base: dict[str, Samples] | None = None
    first: JsonObject = field(default_factory=dict)
    """The drops of the graph with every layer quantized."""

    def input(self, row: int) -> ndarray:
        """The network's input for one image, `(1, …)`."""
        made: ndarray = self.model.prepare([self.examples[row].image]).numpy()
        return made

    def __call__(self, compiled: CompiledModel, rows: Iterable[int]) -> tuple[float, list[list[ndarray]]]:
        """NNCF's `validation_fn`: a value whose fall NNCF holds within 1, and the outputs, by which it ranks layers.

        The value is 1 for the float graph, as NNCF divides by it; another graph's is less by the largest upper end of
        an interval, as a share of its bound.
        """
        module, rows = Ran(compiled), list(rows)
        outputs = [module.outputs(self.input(row)) for row in rows]
        if len(rows) < len(self.examples):  # NNCF looks at the kind of the answer first
            return 1.0, outputs
        if self.base is None:
            self.base = self._samples(module)
            self._check_enough()
            return 1.0, outputs
        drops = self.drops(module)
        self.first = self.first or drops
        return 1 - max(drop["ci95"][1] / self.bounds[name] for name, drop in drops.items()), outputs

    def drops(self, module: Ran) -> JsonObject:
        """The drop of each metric with its 95 % interval over pairs."""
        samples, base = self._samples(module), self.base or {}
        return {name: _drop(base[name], samples[name]) for name in self.bounds}

    def _samples(self, module: Ran) -> dict[str, Samples]:
        loaded: Loaded = Loaded(module, self.model.prepare, "cpu", Artifact(self.model, Path()))
        metrics = METRICS[self.model.kind]
        found = {name: metrics[name](self.model, loaded, self.examples) for name in self.bounds}
        return {name: replace(samples, clusters=self.clusters) for name, samples in found.items()}

    def _check_enough(self) -> None:
        """Raise `UserError` where not even an equal graph would show a drop within the bound."""
        for name, samples in (self.base or {}).items():
            if self.model.kind == "classifier" and not _drop(samples, samples)["ci95"][1] <= self.bounds[name]:
                raise UserError(
                    f"accuracy_drop: {len(samples.values)} images tell no drop of {name} under "
                    f"{_drop(samples, samples)['ci95'][1]:.2g}, and {self.bounds[name]:g} is asked for; "
                    "raise accuracy_samples, give more accuracy_data, or allow more"
                )

    def told(self, compiled: CompiledModel, graph: Graph, full: Iterable[str]) -> JsonObject:
        """The account of the finished graph. `full` names the layers that int8 rounds where nothing bounds the drop.

        Raises `LlmqError` where a drop is not within its bound.
        """
        after, full = self.drops(Ran(compiled)), set(full)
        back = float_layers(graph, full)
        if full and len(back) == len({_layer(name) for name in full}):
            seen = "; ".join(
                f"{name} dropped by {drop['drop']:.4g} ({drop['ci95'][0]:.4g} to {drop['ci95'][1]:.4g}) with all in "
                f"int8, and {self.bounds[name]:g} is allowed"
                for name, drop in self.first.items()
            )
            raise LlmqError(
                f"accuracy_drop: all {len(back)} layers went back to float, and nothing would be quantized: {seen}; "
                "allow more, take more accuracy_samples, or train with adapt.qat"
            )
        for name, drop in after.items():
            if not drop["ci95"][1] <= self.bounds[name]:
                raise LlmqError(
                    f"accuracy_drop: with {len(back)} layers back in float {name} still drops by {drop['drop']:.4g} "
                    f"({drop['ci95'][0]:.4g} to {drop['ci95'][1]:.4g}), and {self.bounds[name]:g} is allowed; allow "
                    "more, take more accuracy_samples, or train with adapt.qat"
                )
        bytes_more = sum(3 * size for size in back.values())  # four bytes a weight in place of one
        return {
            "bound": dict(self.bounds),
            "images": len(self.examples),
            **({"stretches_of_neighbours": len(set(self.clusters))} if self.clusters else {}),
            "float_before": {name: float(figure(samples)[0]) for name, samples in (self.base or {}).items()},
            "drop_before": self.first,
            "drop_after": after,
            "back_to_float": list(back),
            "bytes_more": bytes_more,
        }


def _drop(base: Samples, stage: Samples) -> JsonObject:
    found = difference(base, stage)
    if found is None:  # nothing tells the scatter
        point = float(figure(base)[0] - figure(stage)[0])
        return {"drop": point, "ci95": [point, point] if base == stage else [float("-inf"), float("inf")]}
    return {"drop": found.value, "ci95": list(found.interval)}


def rounded_layers(graph: Graph) -> set[str]:
    """The names of the layers whose weights pass NNCF's rounding."""
    from llmq.vision.graph_layers import WEIGHTED

    layers = [operation for operation in graph.get_ordered_ops() if operation.get_type_name() in WEIGHTED]
    return {layer.get_friendly_name() for layer in layers if _is_rounded(layer.input_value(1).get_node())}


def _is_rounded(weight: Node) -> bool:
    """True for a weight that reaches its layer through a `FakeQuantize`, and a change of shape at most."""
    if weight.get_type_name() in ("Reshape", "Transpose", "Convert", "Unsqueeze"):
        return _is_rounded(weight.input_value(0).get_node())
    return bool(weight.get_type_name() == "FakeQuantize" and not weight.input_value(0).get_node().get_input_size())


def float_layers(graph: Graph, layers: set[str]) -> dict[str, int]:
    """Those of `layers` (names of operations) whose weights are stored in float, each with its number of weights."""
    from llmq.vision.graph_layers import WEIGHTED

    found = {}
    for operation in graph.get_ordered_ops():
        name = operation.get_friendly_name()
        weight = operation.input_value(1).get_node() if operation.get_type_name() in WEIGHTED else None
        if weight is not None and name in layers and weight.get_type_name() == "Constant":
            found[_layer(name)] = int(weight.data.size)
    return found


def _layer(operation: str) -> str:
    """The layer of an operation's name."""
    from llmq.vision.graph_layers import MODULE

    return operation.removeprefix(MODULE).partition("/")[0]
