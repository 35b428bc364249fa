"""How often a classifier is right, and how often it answers as another does."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.plugin import DataWord
from llmq.types import Better, Exhibit, Loaded, Measurement, Samples, Split, Task

COLUMNS = 6


class Accuracy(Task):
    """Top-1 and top-5 accuracy on images with labels; and beside the base, on any images, how often both agree.

    Agreement is the share of images with the same top class, and the mean KL divergence of the base's probabilities
    from the stage's. The wrongly classified are shown, and those whose class changed; without labels, what is seen.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"classifier"})

    data: DataWord = Field(
        "photographs",
        validate_default=True,
        description="what the run trains on, else calibrates on, if unset; where it does neither, this",
    )
    part: Literal["held_out", "all"] = "held_out"
    limit: PositiveInt | None = Field(None, description="images at most")
    pictures: NonNegativeInt = Field(18, description="images shown at most")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for images that are not there, or of other classes than the network's."""
        model: Any = base.model
        model.places(self._examples()[0])

    def score(self, loaded: Loaded) -> Iterable[Measurement | Exhibit]:
        """Top-1, and top-5 where there are more than five classes; what was wrong, in pictures."""
        split, examples = self._examples()
        model: Any = loaded.artifact.model
        logits = _finite(model.logits(loaded, [example.image for example in examples]), self.name)
        names = _names(model, split)
        top = logits.argmax(1).tolist()
        if split.shape == "image":
            seen = [f"{names(t)} {p:.0%}" for t, p in zip(top, logits.softmax(1).amax(1).tolist(), strict=True)]
            yield from self._shown("what it sees", f"of {len(examples)} images", examples, seen, range(len(examples)))
            return
        places = model.places(split)
        truth = [places[example.label] for example in examples]
        for k in (1, 5):
            if k == 1 or k < logits.shape[1]:
                best = logits.topk(k, dim=1).indices.tolist()
                right = [float(t in b) for t, b in zip(truth, best, strict=True)]
                what = f"the label among the {k} largest logits of {logits.shape[1]}"
                yield replace(self._share(f"top{k}", right, what, split), chance=k / logits.shape[1])
        wrong = [i for i, (t, p) in enumerate(zip(truth, top, strict=True)) if t != p]
        titles = [f"{names(t)} → {names(p)}" for t, p in zip(truth, top, strict=True)]
        yield from self._shown(
            "wrongly classified", f"{len(wrong)} of {len(examples)}: label → answer", examples, titles, wrong
        )

    def against(self, loaded: Loaded, base: Loaded) -> Iterable[Measurement | Exhibit]:
        """The share of images with the base's class, the divergence from its probabilities, and whose class changed."""
        import torch

        split, examples = self._examples()
        images = [example.image for example in examples]
        ours, theirs = (_finite(m.artifact.model.logits(m, images), self.name) for m in (loaded, base))  # type: ignore[attr-defined]
        top, base_top = ours.argmax(1).tolist(), theirs.argmax(1).tolist()
        same = [float(a == b) for a, b in zip(top, base_top, strict=True)]
        yield self._share("top1_agreement", same, "the largest logit is the base's", split)
        q, p = ours.double().log_softmax(1), theirs.double().log_softmax(1)
        yield self._mean(
            "kl_to_base", torch.sum(p.exp() * (p - q), 1).tolist(), "nats", "lower", "KL(base || stage)", split
        )
        names = _names(loaded.artifact.model, split)
        titles = [f"{names(b)} → {names(t)}" for t, b in zip(top, base_top, strict=True)]
        changed = [i for i, agrees in enumerate(same) if not agrees]
        yield from self._shown(
            "changed class", f"{len(changed)} of {len(examples)}: base → this stage", examples, titles, changed
        )

    def _examples(self) -> tuple[Split, list[Any]]:
        split: Split = self.data.read()
        rows = split.held_out if self.part == "held_out" else [*split.train, *split.held_out]
        examples = list(rows[: self.limit])
        if not examples:
            raise UserError(f"the {self.part.replace('_', '-')} part of {self.data.word} has no image")
        return split, examples

    def _share(self, metric: str, values: Sequence[float], what: str, split: Split) -> Measurement:
        # With half an image added to each side, so that all right is not taken for exact (Agresti & Min 2005).
        n = len(values)
        share = (sum(values) + 0.5) / (n + 1)
        return self._measured(
            metric, values, "share of images", "higher", math.sqrt(share * (1 - share) / n), what, split
        )

    def _mean(
        self, metric: str, values: Sequence[float], unit: str, better: Better, what: str, split: Split
    ) -> Measurement:
        from llmq.statistics import ratio_stderr

        return self._measured(metric, values, unit, better, ratio_stderr(values)[1], what, split)

    def _measured(
        self,
        metric: str,
        values: Sequence[float],
        unit: str,
        better: Better,
        stderr: float | None,
        what: str,
        split: Split,
    ) -> Measurement:
        convention = f"{what}; {self.data.word} {self.part}, sha256 {split.sha256[:12]}"
        mean = sum(values) / len(values)
        samples = Samples(tuple(values))
        return Measurement(self.name, metric, mean, unit, better, len(values), stderr, convention, samples)

    def _shown(
        self, title: str, text: str, examples: Sequence[Any], titles: Sequence[str], which: Sequence[int]
    ) -> Iterable[Exhibit]:
        chosen = list(which[: self.pictures])
        picture = grid([examples[i].image for i in chosen], [titles[i] for i in chosen]) if chosen else b""
        yield Exhibit(self.name, title, "", text, picture=picture)


def _finite(logits: Any, task: str) -> Any:
    if not bool(logits.isfinite().all()):
        raise LlmqError(f"{task}: the network answers with numbers that are not finite")
    return logits


def _names(model: Any, split: Split) -> Any:
    """What to call an output: as the data calls its class, or else the model."""
    ours = dict(zip(model.places(split), split.classes, strict=False))
    known = model.names()
    return lambda i: ours.get(i) or (known[i][-1] if known else str(i))


def grid(images: Sequence[Any], titles: Sequence[str]) -> bytes:
    """Images uint8 in rows, each under its title, as PNG."""
    from llmq.tasks.pictures import panels, png, show

    columns = min(COLUMNS, len(images))
    figure, axes = panels(math.ceil(len(images) / columns), columns, 1.6, 1.8)
    for panel in axes.ravel():
        panel.set_axis_off()
    for panel, image, title in zip(axes.ravel(), images, titles, strict=False):
        show(panel, thumbnail(image), _wrapped(title))
    return png(figure)


def thumbnail(image: Any, side: int = 160) -> Any:
    """An image no longer than `side`; smaller ones as they are."""
    import numpy as np
    from PIL import Image

    if max(image.shape[:2]) <= side:
        return image
    small = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    small.thumbnail((side, side))
    return np.asarray(small).reshape(small.height, small.width, image.shape[2])


def _wrapped(title: str, width: int = 18) -> str:
    lines = title.replace(" → ", "\n→ ", 1).split("\n")
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines)
