"""How far the images that a generator makes are from others, as a whole."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.types import Loaded, Measurement, Split, Task

FEWEST = 20


class Frechet(Task):
    """Fréchet distance of a generator's images from real ones if `data` is set, else from those of the base.

    Between Gaussians fitted to what Inception sees (FID, if `inception` names its weights), or EfficientNet-Lite0 (no
    FID). It is biased upwards by about c/n: `frechet_floor` is what two sets of one origin have at this n. From the
    base, first with the same latents, where the noise of sampling is the same on both sides and an unchanged model has
    0; then with other latents, where only what exceeds the floor tells.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"gan"})

    data: DataWord | None = Field(None, description="real images; the base's samples if unset")
    part: Literal["held_out", "train", "all"] = Field("all", description="the real images to be set against")
    n: PositiveInt = Field(500, ge=FEWEST, description="images on each side")
    seed: int = Field(0, ge=0, lt=2**32, description="of the latents")
    inception: Path | None = Field(None, description="weights of FID's Inception (pytorch-fid's or torch-fidelity's)")

    def check(self) -> None:
        """Raise `UserError` for data or weights of the features that are not there."""
        super().check()
        if self.inception:
            from llmq.models.state import check_weights

            check_weights(str(self.inception))
        else:
            from llmq.models.efficientnet_lite0 import lite0_file

            lite0_file()

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for real images that are too few, or cannot be framed."""
        if self.data:
            self._images(base.model)

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """With `data`, the distance from real images, and of real images from others of their kind."""
        if not self.data:
            return
        from llmq.tasks.image_features import extractor

        model: Any = loaded.artifact.model
        extract = extractor(self.inception, loaded.device)
        real, about = self._real(model, extract)
        rows = extract(model.generate(loaded, model.latents(self.n, self.seed)))
        yield self._measured("frechet_distance", rows, real, extract.name, f"samples from {about}")
        half = len(real) // 2
        if half >= FEWEST:
            yield self._measured(
                "frechet_floor", real[:half], real[half : 2 * half], extract.name, f"halves of {about}"
            )

    def against(self, loaded: Loaded, base: Loaded) -> Iterable[Measurement]:
        """Without `data`, the distance from the base's samples, and of the base's samples from others of its own."""
        if self.data:
            return
        from llmq.tasks.image_features import extractor, kept

        extract = extractor(self.inception, base.device)
        model: Any = loaded.artifact.model
        made = extract(model.generate(loaded, model.latents(self.n, self.seed)))
        own, others = (kept(extract, base, self.n, self.seed, purpose) for purpose in ("samples", "others"))
        same = "stage from base, the same latents: the noise of sampling cancels, an unchanged stage has 0"
        yield self._measured("frechet_distance", made, own, extract.name, same)
        new = "stage from base, other latents: compare with frechet_floor"
        yield self._measured("frechet_distance_other_latents", made, others, extract.name, new)
        yield self._measured("frechet_floor", own, others, extract.name, "base from base, other latents")

    def _images(self, model: Any) -> tuple[list[Any], Split]:
        """At most `n` real images, drawn evenly. Raises `UserError` for too few, or what does not fit the generator."""
        assert self.data
        split = self.data.read()
        model.check_split(split)
        examples = {"held_out": split.held_out, "train": split.train, "all": [*split.train, *split.held_out]}[self.part]
        if len(examples) < FEWEST:
            raise UserError(f"{self.data.word} {self.part} has {len(examples)} images; {FEWEST} are needed")
        step = max(1, len(examples) // self.n)
        return [examples[i * step].image for i in range(min(self.n, len(examples)))], split

    def _real(self, model: Any, extract: Any) -> tuple[Any, str]:
        """Features of at most `n` real images of the generator's size, and what they are."""
        images, split = self._images(model)
        word = self.data.word if self.data else ""
        return extract(model.framed(images)), f"real images, {word} {self.part}, sha256 {split.sha256[:12]}"

    def _measured(self, metric: str, first: Any, second: Any, features: str, between: str) -> Measurement:
        from llmq.tasks.gaussians import frechet_with_stderr

        value, stderr = frechet_with_stderr(first, second)
        counts = f"{len(first)} and {len(second)} images" if len(first) != len(second) else f"{len(first)} images each"
        convention = (
            f"{features}; {between}; {counts}, covariance over n - 1, biased upwards by about c/n; seed {self.seed}; "
            "standard error by leaving out tenths"
        )
        return Measurement(
            self.name, metric, value, "squared feature distance", "lower", len(first), stderr, convention
        )
