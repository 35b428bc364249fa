"""Top-1, top-5 and balanced accuracy and calibration on images with labels; beside the base, how often both agree.

Agreement is the share of images with the same top class, and the mean KL divergence of the base's probabilities
from the stage's. Pictures show the confusion matrix, the wrongly classified and those whose class changed; without
labels, the top classes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from llmq import together
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.plugin import DataWord, data_of_run
from llmq.types import Exhibit, Loaded, Measurement, Split, Task
from llmq.vision.classifier import Classifier

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from llmq.sketch import Sketch, Work
    from llmq.vision.images import Example

COLUMNS, SIDE, WIDTH = 6, 160, 18  # images in a row, pixels of one at most, letters in a line of its title


class Accuracy(Task[Classifier]):
    suits: ClassVar[frozenset[str]] = frozenset({"classifier"})
    in_every_process: ClassVar[bool] = True

    data: DataWord = data_of_run("photographs")
    part: Literal["held_out", "all"] = "held_out"
    limit: PositiveInt | None = Field(None, description="images at most")
    pictures: NonNegativeInt = Field(18, description="images shown at most")

    def check_base(self, base: Artifact[Classifier]) -> None:
        base.model.places(self._examples()[0])

    def foresee(self, stage: "Sketch") -> "Work":
        """Passes over the images of the part, a batch at a time."""
        from llmq.vision.classifier import BATCH
        from llmq.vision.sizing import asked

        return asked(stage, self.data.expected(), self.limit, BATCH)

    def foresee_against(self, stage: "Sketch", base: "Sketch") -> "Work":
        """The same passes by the stage and by the base."""
        from llmq.vision.sizing import beside

        return beside(self.foresee(stage), self.foresee(base))

    def score(self, loaded: Loaded[Classifier]) -> Iterable[Measurement | Exhibit]:
        """Top-1, top-5 for more than five classes, balanced accuracy, calibration; pictures of what is wrong."""
        from llmq.statistics.figures import share
        from llmq.tasks.accuracy import confusion

        split, examples = self._examples()
        model = loaded.artifact.model
        logits = self._logits(loaded, split)  # (images, classes)
        names = _names(model, split)
        top = logits.argmax(1).tolist()
        if split.shape == "image":
            seen = [f"{names(t)} {p:.0%}" for t, p in zip(top, logits.softmax(1).amax(1).tolist(), strict=True)]
            yield from self._shown("what it sees", f"of {len(examples)} images", examples, seen, range(len(examples)))
            return
        places = model.places(split)
        by_number = "; classes by number" if model.names() and model.outputs_of(split) else ""  # names that none shares
        told = partial(self._convention, split=split, more=by_number)
        truth = [places[example.label] for example in examples if example.label is not None]
        for k in (1, 5):
            if k == 1 or k < logits.shape[1]:
                best = logits.topk(k, dim=1).indices.tolist()  # (images, k)
                right = [float(t in b) for t, b in zip(truth, best, strict=True)]
                convention = told(f"the label among the {k} largest logits of {logits.shape[1]}")
                figure = share(self.name, f"top{k}", right, "share of images", "higher", convention)
                yield replace(figure, chance=k / logits.shape[1])
        yield from self._by_class(truth, top, logits, told)
        wrong = [i for i, (t, p) in enumerate(zip(truth, top, strict=True)) if t != p]
        yield Exhibit(
            self.name,
            "confusion matrix",
            "",
            confusion.confused(truth, top, names),
            picture=confusion.picture(truth, top, names),
        )
        titles = [f"{names(t)} → {names(p)}" for t, p in zip(truth, top, strict=True)]
        yield from self._shown(
            "wrongly classified", f"{len(wrong)} of {len(examples)}: label → answer", examples, titles, wrong
        )

    def _by_class(
        self, truth: Sequence[int], top: Sequence[int], logits: "Tensor", told: Callable[[str], str]
    ) -> Iterable[Measurement]:
        """The accuracy of the classes on equal terms, and the expected calibration error of the top class."""
        import numpy as np

        from llmq.statistics.calibration import BINS, balanced, calibration_error
        from llmq.statistics.figures import mean
        from llmq.statistics.resampling import quantile_spread

        right = [float(t == p) for t, p in zip(truth, top, strict=True)]
        scores, stderr = balanced(truth, right)
        convention = told(f"mean over the {len(set(truth))} classes that occur of each one's top-1")
        figure = mean(self.name, "balanced_accuracy", scores, "share of images", "higher", convention)
        yield replace(figure, stderr=stderr, chance=1 / logits.shape[1])
        sure, hits = logits.double().softmax(1).amax(1).numpy(), np.array(right)
        value, n = float(calibration_error(sure, hits)), len(right)
        spread = quantile_spread(lambda rows: calibration_error(sure[rows], hits[rows]), n, 0) if n > 1 else None
        convention = told(
            f"|confidence - accuracy| of the top class in {BINS} bins of equal width, weighed by images (Guo et al. "
            "2017); biased upwards for few images; standard error by bootstrap"
        )
        yield Measurement(self.name, "calibration_error", value, "probability", "lower", n, spread, convention)

    def against(self, loaded: Loaded[Classifier], base: Loaded[Classifier]) -> Iterable[Measurement | Exhibit]:
        """The share of images with the base's class, the divergence from the base, and the changed classes."""
        from llmq.statistics.figures import mean, share

        split, examples = self._examples()
        ours, theirs = (self._logits(side, split) for side in (loaded, base))  # (images, classes) each
        top, base_top = ours.argmax(1).tolist(), theirs.argmax(1).tolist()
        same = [float(a == b) for a, b in zip(top, base_top, strict=True)]
        convention = self._convention("the largest logit is the base's", split)
        yield share(self.name, "top1_agreement", same, "share of images", "higher", convention)
        q, p = ours.double().log_softmax(1), theirs.double().log_softmax(1)
        divergence = (p.exp() * (p - q)).sum(1).tolist()  # (images,), nats
        convention = self._convention("KL(base || stage)", split)
        figure = mean(self.name, "kl_to_base", divergence, "nats", "lower", convention)
        # Added up in order, as in every report before: the last digit depends on it.
        yield replace(figure, value=sum(divergence) / len(divergence))
        names = _names(loaded.artifact.model, split)
        titles = [f"{names(b)} → {names(t)}" for t, b in zip(top, base_top, strict=True)]
        changed = [i for i, agrees in enumerate(same) if not agrees]
        yield from self._shown(
            "changed class", f"{len(changed)} of {len(examples)}: base → this stage", examples, titles, changed
        )

    def _logits(self, loaded: Loaded[Classifier], split: Split) -> "Tensor":
        """The logits of all images `(images, classes)`; the processes of a run share the batches."""
        import numpy as np
        import torch

        rows = together.answers_of(partial(_share_of_logits, self, split.sha256), [loaded])
        logits = torch.from_numpy(np.stack(rows))
        if not bool(logits.isfinite().all()):
            raise LlmqError("the network answers with numbers that are not finite")
        return logits

    def _examples(self) -> "tuple[Split, list[Example]]":
        split: Split = self.data.read()
        parts = [split.held_out] if self.part == "held_out" else [split.train, split.held_out]
        examples = list(itertools.islice(itertools.chain(*parts), self.limit))
        if not examples:
            raise UserError(f"the {self.part.replace('_', '-')} part of {self.data.word} has no image")
        return split, examples

    def _convention(self, what: str, split: Split, more: str = "") -> str:
        return f"{what}{more}; {self.data.word} {self.part}, sha256 {split.sha256[:12]}"

    def _shown(
        self, title: str, text: str, examples: "Sequence[Example]", titles: Sequence[str], which: Sequence[int]
    ) -> Iterable[Exhibit]:
        chosen = list(which[: self.pictures])
        picture = grid([examples[i].image for i in chosen], [titles[i] for i in chosen]) if chosen else b""
        yield Exhibit(self.name, title, "", text, picture=picture)


def _share_of_logits(
    task: Accuracy, sha256: str, models: "Sequence[Loaded[Classifier]]", share: together.Share
) -> "dict[int, ndarray]":
    """The logits `(classes,)` of the images in a share of the batches."""
    from llmq.vision.classifier import BATCH
    from llmq.vision.family import check_same

    (loaded,) = models
    split, examples = task._examples()
    check_same(split, sha256, task.data.word)
    numbers = share.in_batches(len(examples), BATCH)
    images = [examples[i].image for i in numbers]
    logits = loaded.artifact.model.logits(loaded, images).numpy() if images else ()
    return dict(zip(numbers, logits, strict=True))


def _names(model: Classifier, split: Split) -> Callable[[int], str]:
    """A function from an output to the name of its class: that in the data, or else the model's."""
    ours = dict(zip(model.places(split), split.classes, strict=False))
    known = model.names()
    return lambda i: ours.get(i) or (known[i][-1] if known else str(i))


def grid(images: "Sequence[ndarray]", titles: Sequence[str]) -> bytes:
    """The uint8 images in rows, each under a title, as PNG."""
    from llmq.vision.pictures import panels, png, show

    columns = min(COLUMNS, len(images))
    figure, axes = panels(math.ceil(len(images) / columns), columns, 1.6, 1.8)
    for panel in axes.ravel():
        panel.set_axis_off()
    for panel, image, title in zip(axes.ravel(), images, titles, strict=False):
        lines = title.replace(" → ", "\n→ ", 1).split("\n")
        short = (line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines)
        show(panel, _thumbnail(image), "\n".join(short))
    return png(figure)


def _thumbnail(image: "ndarray") -> "ndarray":
    import numpy as np
    from PIL import Image

    if max(image.shape[:2]) <= SIDE:
        return image
    small = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    small.thumbnail((SIDE, SIDE))
    made: ndarray = np.asarray(small).reshape(small.height, small.width, image.shape[2])
    return made
