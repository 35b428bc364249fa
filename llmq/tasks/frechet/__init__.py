"""Fréchet distance of a generator's images from real ones if `data` is set, else from those of the base.

The Gaussians are fitted to the features of Inception (FID, if `inception` names its weights), or of EfficientNet-Lite0
(no FID). The figure is biased upwards by about c/n: `frechet_floor` is the distance of two sets of one origin at this
n. The distance from the base is taken first with the same latents, where the noise of sampling is the same on both
sides and an unchanged model has 0; then with other latents, where only the excess over the floor tells. Beside it:
precision, recall, density, coverage, and the spread of the images, which falls as modes collapse.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq import together
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import cache, make_whole, sha256_files, sha256_text
from llmq.plugin import DataWord
from llmq.types import Loaded, Measurement, Split, Task

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from torch.nn import Module

    from llmq.sketch import Sketch, Unit, Work

FEWEST = 20
LITE0_SIZE = 224
LOOKING = 215_000_000
"""Bytes that EfficientNet-Lite0 takes for a batch, its weights among them, measured."""
NEAR, DENSE = 3, 5
"""The neighbours that the balls of precision and recall, and of density and coverage, reach to, as in their papers."""
TOGETHER = 64
"""Images that one process makes and looks at, whatever the number of processes: whole batches of both networks."""
BATCH = 8  # fits into a processor's cache; batches of 50 take twice as long


class Frechet(Task):
    suits: ClassVar[frozenset[str]] = frozenset({"gan"})
    in_every_process: ClassVar[bool] = True

    data: DataWord | None = Field(None, description="real images; the base's samples if unset")
    part: Literal["held_out", "train", "all"] = Field("all", description="the real images to be set against")
    n: PositiveInt = Field(500, ge=FEWEST, description="images on each side")
    seed: int = Field(0, ge=0, lt=2**32, description="of the latents")
    inception: Path | None = Field(None, description="weights of FID's Inception (pytorch-fid's or torch-fidelity's)")

    def check(self) -> None:
        super().check()
        if self.inception:
            from llmq.vision.state import check_weights

            check_weights(str(self.inception))
        else:
            from llmq.vision.efficientnet_lite0 import lite0_file

            lite0_file()

    def check_base(self, base: Artifact) -> None:
        if self.data:
            self._images(base.model)

    def foresee(self, stage: "Sketch") -> "Work":
        """With `data`, images are made, and looked at by a network that is not of the run."""
        from llmq.sketch import Work

        return self._foreseen(stage) if self.data else Work()

    def foresee_against(self, stage: "Sketch", base: "Sketch") -> "Work":
        """Without `data`, the same of the stage; the cache keeps the features of the base."""
        from dataclasses import replace

        from llmq.sketch import Work

        if self.data:
            return Work()
        work = self._foreseen(stage)
        return replace(work, memory=work.memory + base.in_memory)

    def _foreseen(self, stage: "Sketch") -> "Work":
        from dataclasses import replace

        from llmq.sketch import Trial
        from llmq.vision.sizing import asked

        made = asked(stage, None, self.n, BATCH, self.n)
        sides = 2 if self.data else 3  # samples and real images; or samples, and two sets of the base's
        operations = {**made.operations, Trial("features of EfficientNet-Lite0", _looking): float(sides * self.n)}
        return replace(made, memory=made.memory + LOOKING, operations=operations, seconds=made.seconds + 1.0)

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """With `data`, the distance from real images, and of real images from others of their kind."""
        if not self.data:
            return
        model: Any = loaded.artifact.model
        extract = self._extractor(loaded.device)
        images, split = self._images(model)
        framed = model.framed(images)
        of_real = partial(_share_of_real, self, framed), partial(_features_of, extract, framed)
        real = _joined(together.answers_of(of_real[0], [loaded], of_real[1]))  # (n, features)
        about = f"real images, {self.data.word} {self.part}, sha256 {split.sha256[:12]}"
        rows = self.made(extract, loaded)  # (n, features)
        yield self._measured("frechet_distance", rows, real, extract.name, f"samples from {about}")
        yield from self._manifolds(rows, real, extract.name, f"samples among {about}")
        halves, of_halves = _halves(real, split)
        if min(map(len, halves)) >= FEWEST:
            yield self._measured("frechet_floor", *halves, extract.name, f"{of_halves} of {about}")

    def against(self, loaded: Loaded, base: Loaded) -> Iterable[Measurement]:
        """Without `data`, the distance from samples of the base, and that between two sets of samples of the base."""
        if self.data:
            return
        extract = self._extractor(base.device)
        made = self.made(extract, loaded)
        own, others = (kept(self, extract, base, purpose) for purpose in ("samples", "others"))
        same = "stage from base, the same latents: the noise of sampling cancels, an unchanged stage has 0"
        yield self._measured("frechet_distance", made, own, extract.name, same)
        new = "stage from base, other latents: compare with frechet_floor"
        yield self._measured("frechet_distance_other_latents", made, others, extract.name, new)
        yield from self._manifolds(made, others, extract.name, "stage among samples of the base, other latents")
        yield self._measured("frechet_floor", own, others, extract.name, "base from base, other latents")

    def made(self, extract: "Extractor", loaded: Loaded, purpose: str = "samples") -> "ndarray":
        """The features `(n, d)` of the images that a generator makes of its latents for a purpose."""
        work, own = partial(_share_of_made, self, purpose), partial(_features_of_made, self, extract, loaded, purpose)
        return _joined(together.answers_of(work, [loaded], own))

    def _manifolds(self, made: "ndarray", real: "ndarray", features: str, between: str) -> Iterable[Measurement]:
        """Precision and recall, density and coverage, and the spread of the made images over that of the real ones."""
        from llmq.matrix.neighbours import manifolds, spread
        from llmq.statistics.figures import mean, ratio_stderr, share

        about = f"{features}; {between}; {len(made)} made, {len(real)} real; seed {self.seed}"
        found, to = manifolds(real, made, NEAR, DENSE), "nearest neighbour of its own set"
        for metric, scores, words in (
            ("precision", found.precision, f"made images in the ball of a real one, to the {NEAR}rd {to}"),
            ("recall", found.recall, f"real images in the ball of a made one, to the {NEAR}rd {to}"),
            ("coverage", found.coverage, f"real images with a made one in their ball, to the {DENSE}th {to}"),
        ):
            yield share(self.name, metric, scores.tolist(), "share of images", "higher", f"{words}; {about}")
        words = f"real balls around a made image over {DENSE}, balls to the {DENSE}th {to}, 1 for equal distributions"
        yield mean(self.name, "density", found.density.tolist(), "", "higher", f"{words}; {about}")
        (ours, each), (theirs, of_real) = spread(made), spread(real)
        if not theirs:  # all real images are alike, and nothing to compare a spread with
            return
        errors = [2 * (ratio_stderr(rows.tolist())[1] or 0.0) for rows in (each, of_real)]  # each pair has two rows
        stderr = ours / theirs * ((errors[0] / ours) ** 2 + (errors[1] / theirs) ** 2) ** 0.5 if ours else None
        words = "mean distance of two made images over that of two real ones; 0 for a single mode, 1 for equal spread"
        yield Measurement(self.name, "spread", ours / theirs, "", "unknown", len(made), stderr, f"{words}; {about}")

    def _extractor(self, device: str) -> "Extractor":
        return of_inception(self.inception, device) if self.inception else of_lite0(device)

    def _images(self, model: Any) -> "tuple[list[ndarray], Split]":
        """At most `n` real images, drawn evenly. Raises `UserError` for too few, or what does not fit the generator."""
        assert self.data
        split = self.data.read()
        model.check_split(split)
        parts = {"held_out": [split.held_out], "train": [split.train], "all": [split.train, split.held_out]}[self.part]
        places = [(part, i) for part in parts for i in range(len(part))]  # an image is opened where it is drawn
        if len(places) < FEWEST:
            raise UserError(f"{self.data.word} {self.part} has {len(places)} images; {FEWEST} are needed")
        drawn = [places[k * len(places) // self.n] for k in range(self.n)] if self.n < len(places) else places
        return [part[i].image for part, i in drawn], split

    def _measured(self, metric: str, first: "ndarray", second: "ndarray", features: str, between: str) -> Measurement:
        from llmq.matrix.gaussians import frechet_with_stderr

        value, stderr = frechet_with_stderr(first, second)
        counts = f"{len(first)} and {len(second)} images" if len(first) != len(second) else f"{len(first)} images each"
        convention = (
            f"{features}; {between}; {counts}, covariance over n - 1, biased upwards by about c/n; seed {self.seed}; "
            "standard error by leaving out tenths"
        )
        return Measurement(
            self.name, metric, value, "squared feature distance", "lower", len(first), stderr, convention
        )


def _halves(rows: "ndarray", split: Split) -> "tuple[tuple[ndarray, ndarray], str]":
    """Every second of the rows `(n, features)` and the others, as folders have one class behind the other.

    Slices of a volume are alike, so that every second one is no other set: there it is every second stretch of them.
    """
    from llmq.statistics.figures import stretches

    turns = [each % 2 for each in (stretches(len(rows)) if split.neighbours else range(len(rows)))]
    halves = tuple(rows[[i for i, turn in enumerate(turns) if turn == side]] for side in (0, 1))
    return (halves[0], halves[1]), "every second stretch" if split.neighbours else "every second"


@dataclass(frozen=True)
class Extractor:
    """A network without classifier, the name of the features, and the hash of the weights."""

    name: str
    identity: str
    of_batch: "Callable[[Tensor], Tensor]"
    """Images float `(n, 3, height, width)` on [0, 255] to features `(n, d)`."""

    def __call__(self, images: "Sequence[ndarray]") -> "ndarray":
        """The features float64 `(n, d)` of images uint8 `(height, width, 1 or 3)` of one size."""
        import numpy as np
        import torch

        parts = []
        for i in range(0, len(images), BATCH):
            # (n, channels, height, width); grey is repeated below, as both networks take three channels.
            pixels = torch.from_numpy(np.stack(images[i : i + BATCH])).permute(0, 3, 1, 2).float()
            with torch.inference_mode():
                parts.append(self.of_batch(pixels.expand(-1, 3, -1, -1)).double().cpu())
        rows: ndarray = torch.cat(parts).numpy()  # (n, features), float64
        return rows


def of_inception(path: Path, device: str) -> Extractor:
    """The 2048 pooled features of FID's Inception. Raises `UserError` for a file of other weights."""
    from torch import nn

    from llmq.tasks.frechet.inception import fid_inception, resized
    from llmq.vision.state import load_strictly, read_state

    network = fid_inception()
    load_strictly(network, read_state(str(path)), str(path))
    network.fc = nn.Identity()
    network.eval().to(device)
    name = "FID's Inception, 2048 features"
    return Extractor(name, sha256_files([path]), lambda x: network((resized(x.to(device)) - 128) / 128))


def _looking(device: str) -> "Unit":
    """A batch through EfficientNet-Lite0 with random weights, and its images."""
    import timm
    import torch

    from llmq.vision.efficientnet_lite0 import ARCHITECTURE

    features = _features(timm.create_model(ARCHITECTURE), device)
    pixels = torch.zeros(BATCH, 3, LITE0_SIZE, LITE0_SIZE)

    def run() -> None:
        with torch.inference_mode():
            features(pixels)

    return run, float(BATCH)


def of_lite0(device: str) -> Extractor:
    """The 1280 pooled features of EfficientNet-Lite0 trained on ImageNet."""
    import timm

    from llmq.vision.efficientnet_lite0 import ARCHITECTURE, WORD, lite0_file, state_of_lite0
    from llmq.vision.state import load_strictly

    network = timm.create_model(ARCHITECTURE)
    load_strictly(network, state_of_lite0(network), WORD)
    name = f"EfficientNet-Lite0, 1280 features, images scaled to {LITE0_SIZE} pixels; not FID"
    return Extractor(name, sha256_files([lite0_file()]), _features(network, device))


def _features(network: "Module", device: str) -> "Callable[[Tensor], Tensor]":
    """The pooled features of a batch of images, the function of an `Extractor`."""
    import torch
    from torch.nn.functional import interpolate

    from llmq.vision.efficientnet_lite0 import MEAN, STD

    network.reset_classifier(0)  # type: ignore[operator]
    network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def of_batch(pixels: "Tensor") -> "Tensor":
        scaled = interpolate(pixels.to(device), (LITE0_SIZE, LITE0_SIZE), mode="bilinear", antialias=True)
        features: Tensor = network(((scaled / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last))
        return features

    return of_batch


def _share_of_made(
    task: Frechet, purpose: str, models: Sequence[Loaded], share: together.Share
) -> dict[int, "ndarray"]:
    return _features_of_made(task, task._extractor(models[0].device), models[0], purpose, share)


def _features_of_made(
    task: Frechet, extract: Extractor, loaded: Loaded, purpose: str, share: together.Share
) -> dict[int, "ndarray"]:
    model: Any = loaded.artifact.model
    parts = model.latents(task.n, task.seed, purpose).split(TOGETHER)
    return {i: extract(model.generate(loaded, parts[i])) for i in share.of(range(len(parts)))}


def _share_of_real(
    task: Frechet, images: "Sequence[ndarray]", models: Sequence[Loaded], share: together.Share
) -> dict[int, "ndarray"]:
    return _features_of(task._extractor(models[0].device), images, share)


def _features_of(extract: Extractor, images: "Sequence[ndarray]", share: together.Share) -> dict[int, "ndarray"]:
    starts = range(0, len(images), TOGETHER)
    return {i: extract(images[starts[i] : starts[i] + TOGETHER]) for i in share.of(range(len(starts)))}


def _joined(parts: "Sequence[ndarray]") -> "ndarray":
    import numpy as np

    rows: ndarray = np.concatenate(parts)
    return rows


def kept(task: Frechet, extract: Extractor, loaded: Loaded, purpose: str) -> "ndarray":
    """The features of a generator's samples; the cache keeps those of the base for every other stage."""
    import torch
    from safetensors.numpy import load_file, save_file

    artifact = loaded.artifact
    model: Any = artifact.model
    about = [model.word, model.model_dump_json(), sha256_files(artifact.weight_files()), loaded.device]
    about += [extract.name, extract.identity, str(task.n), str(task.seed), purpose, torch.__version__]

    def fill(folder: Path) -> None:
        save_file({"rows": task.made(extract, loaded, purpose)}, folder / "features.safetensors")

    folder = make_whole(cache("features", sha256_text(*about)[:24]), fill, shared=True)
    rows: ndarray = load_file(folder / "features.safetensors")["rows"]
    return rows
