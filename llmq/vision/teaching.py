"""A teacher for image models: its outputs, and feature maps, take the place of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, functional

from llmq.artifact import Artifact
from llmq.errors import UserError, did_you_mean
from llmq.types import Context, Loaded
from llmq.vision.family import Batch, ImageModel, Learner, as_tuple
from llmq.vision.likeness import in_order_of

if TYPE_CHECKING:
    from llmq.vision.images import Example

Distance = Literal["kl", "l1", "l2"]
INPUTS = ("images", "low", "latents")
"""The name of the network's input in the batches of each family."""
WATCHED = 64  # latents of the figure while training


@dataclass(frozen=True)
class Lessons:
    """Batches and held-out figures of a family; the loss is the distance of the outputs from those of a teacher.

    A `label_weight` share of the loss is the family's own, of labels. `features` names layers of both networks: the
    distance of their attention maps (Zagoruyko & Komodakis 2017) is added `feature_weight` times.
    """

    model: Any
    teacher: Module
    loss: Distance
    temperature: float = 1.0
    label_weight: float = 0.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0

    def learners(self, network: Module) -> list[Learner]:
        own = self.model.learners(network)[-1].loss if self.label_weight else None
        maps = Maps(network, self.features), Maps(self.teacher, self.features)

        def away(batch: Batch) -> Tensor:
            x = batch[next(name for name in INPUTS if name in batch)]
            wanted, made = self.wanted(x), as_tuple(network(x))
            if self.model.unordered:  # queries of one number may look for other objects
                wanted = in_order_of([t.detach().float() for t in made], wanted)
            total = self.distance(made, wanted)
            if own is not None:
                total = (1 - self.label_weight) * total + self.label_weight * own(batch)
            return total + self.feature_weight * maps[0].away(maps[1]) if self.features else total

        return [Learner("distance", network, away)]

    def wanted(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the teacher."""
        with torch.no_grad():
            return tuple(t.float() for t in as_tuple(self.teacher(x)))

    def distance(self, made: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """The mean over outputs. Of several outputs each is measured by the teacher's standard deviation."""
        distances: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "l1": functional.l1_loss,
            "l2": functional.mse_loss,
            "kl": self._divergence,
        }
        apart = distances[self.loss]
        if len(wanted) == 1:
            return apart(made[0].float(), wanted[0])
        # An output that hardly varies, as of a teacher that knows little, must not count without bound.
        scales = [t.std().clamp_min(0.01 * float(t.square().mean().sqrt())).clamp_min(1e-3) for t in wanted]
        parts = [apart(m.float() / s, w / s) for m, w, s in zip(made, wanted, scales, strict=True)]
        return torch.stack(parts).mean()

    def _divergence(self, made: Tensor, wanted: Tensor) -> Tensor:
        """KL(teacher || student) at a temperature, times its square (Hinton et al. 2015), in nats an image."""
        q, p = (made / self.temperature).log_softmax(-1), (wanted / self.temperature).log_softmax(-1)
        return functional.kl_div(q, p, reduction="batchmean", log_target=True) * self.temperature**2

    def batch(self, examples: Sequence[Any], rng: np.random.Generator, augment: str, crop: int | None) -> Batch:
        shown = examples if self.label_weight else unlabelled(examples)
        batch: Batch = self.model.batch(shown, rng, augment, crop)
        return batch

    def validate_on(self, loaded: Loaded, examples: Sequence[Any]) -> tuple[str, float]:
        figure: tuple[str, float] = self.model.validate_on(loaded, examples)
        return figure


def unlabelled(examples: Sequence[Example]) -> list[Example]:
    """Examples of which no label is read: images without labels are as good."""
    return [replace(each, label=0) for each in examples]


class FromLatents(Lessons):
    """New latents for each step, so that a generator memorises none; the figure is the PSNR from the teacher."""

    def batch(self, examples: Sequence[int], rng: np.random.Generator, augment: str, crop: int | None) -> Batch:
        latents = rng.standard_normal((len(examples), self.model.latent_size, 1, 1), dtype="float32")
        return {"latents": torch.from_numpy(latents)}

    def validate_on(self, loaded: Loaded, examples: Sequence[int]) -> tuple[str, float]:
        """The mean PSNR in dB against the teacher, on fixed latents that training does not draw."""
        latents = self.model.latents(len(examples), 0, "watched").to(loaded.device)
        with torch.no_grad():
            (wanted,) = self.wanted(latents)
            # The values lie in [-1, 1], a data range of 2: the squared peak of the PSNR is 4.
            squared = (loaded.module(latents).float() - wanted).square().mean((1, 2, 3)) / 4  # (n,)
        return "psnr", float(-10 * squared.clamp_min(1e-10).log10().mean())


class Maps:
    """The last outputs of some layers of a network, as maps of attention."""

    def __init__(self, network: Module, names: Sequence[str]) -> None:
        self.seen: dict[str, Tensor] = {}
        layers = dict(network.named_modules())
        for name in names:
            if name not in layers:
                raise UserError(f"features: the network has no layer {name!r}{did_you_mean(name, layers)}")
            layers[name].register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Callable[[Module, object, object], None]:
        def keep(module: Module, inputs: object, output: object) -> None:
            if not isinstance(output, Tensor) or output.dim() < 3:
                raise UserError(f"features: {name!r} gives no feature map; name a convolution, or a block of them")
            self.seen[name] = output

        return keep

    def away(self, others: Maps) -> Tensor:
        """The mean distance from the maps of another network, whose layers may have other numbers of channels."""
        parts = []
        for name, map_ in self.seen.items():
            other = others.seen[name]
            if map_.shape[2:] != other.shape[2:]:
                sizes = " and ".join(str(list(m.shape[2:])) for m in (map_, other))
                raise UserError(f"features: {name!r} has maps of {sizes} in network and teacher")
            parts.append((_attention(map_) - _attention(other)).square().sum(1).mean())
        return torch.stack(parts).mean()


def _attention(map_: Tensor) -> Tensor:
    """The squares, added up over channels `(n, places)`, of norm 1 for each image."""
    return functional.normalize(map_.float().square().mean(1).flatten(1), dim=1)


def teacher_of(name: str, artifact: Artifact, folder: Path, context: Context) -> Artifact:
    """The base, a stage of the run that `folder` lies in, or a stage in any folder.

    Raises `UserError` for one of another kind, or that sees images otherwise.
    """
    from llmq.files import at_home

    if name == "base":
        base: Artifact = artifact.model.base(context)
        return base
    places = [folder.parent / name, at_home(name)]
    where = next((place for place in places if (place / "artifact.json").is_file()), None)
    if where is None:
        stages = sorted(path.parent.name for path in folder.parent.glob("*/artifact.json"))
        raise UserError(f"teacher {name!r} is no stage of this run; {', '.join(stages) or 'it has none yet'}")
    teacher = Artifact.load(where)
    if teacher.model.kind != artifact.model.kind:
        raise UserError(f"teacher {name!r} is a {teacher.model.kind}, and this network is a {artifact.model.kind}")
    return teacher


def check_alike(
    teacher: Loaded[Any], model: ImageModel, network: Module, examples: Sequence[Example], classes: Sequence[str]
) -> None:
    """Raise `UserError` for a teacher that makes other inputs of an image, or other outputs, by shape or by name.

    Where no weights name the outputs, `classes` are those that the network is shown.
    """
    if examples and not isinstance(examples, range):
        image = [examples[0].image]
        ours, theirs = model.prepare(image), teacher.artifact.model.prepare(image)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise UserError(
                f"the teacher {teacher.artifact.model.title} makes another input of an image than {model.title}: "
                "size, channels, mean and std must be the same"
            )
    x = model.example(1).to(teacher.device)
    with torch.inference_mode():
        shapes = [[list(t.shape) for t in as_tuple(net(x))] for net in (network.eval(), teacher.module)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the teacher answers with {shapes[1]} for one input, and the network with {shapes[0]}")
    names, others = model.names(), teacher.artifact.model.names()
    if not (names or others):
        learned = teacher.artifact.notes.get("data", {}).get("classes", ())
        names, others = (tuple((name,) for name in side) for side in (classes, learned))
    _check_classes(names, others)


def _check_classes(names: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> None:
    """Raise `UserError` for outputs that two networks name otherwise. A class may have other words, but one place."""
    ours, theirs = ([{name.lower() for name in called} for called in side] for side in (names, others))
    alike = [bool(a & b) for a, b in zip(ours, theirs, strict=False)]
    for i, same in enumerate(alike):
        if not same and (not any(alike) or any(ours[i] & group for group in theirs)):
            raise UserError(
                f"output {i} of the teacher is {others[i][-1]!r}, and that of the network {names[i][-1]!r}: a teacher "
                "tells the same classes in the same order"
            )
