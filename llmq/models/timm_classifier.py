"""Image classifiers of timm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import at_home, sha256_files
from llmq.models import efficientnet_lite0 as lite0
from llmq.models import hub, timm_config
from llmq.models.classifier import Classifier, with_channels, with_new_head
from llmq.types import Context, Model

HUB = "hf-hub:"
TIMM = "pretrained"


class TimmClassifier(Classifier, Model):
    """An image classifier of timm: random, given weights, the hub's, timm's own, or `efficientnet-lite0`.

    What is unset follows from the weights' configuration, or else from timm's of the architecture. Images of another
    number of channels are repeated (grey) or mixed to their luma (colour); they are scaled and cut as timm evaluates.
    """

    weights: str | None = Field(
        None,
        description="a .safetensors or .pth file, a folder, hf-hub:owner/name, pretrained (timm's), or a built-in word",
    )
    architecture: str | None = Field(None, description="timm's name, such as resnet18, or resnet18.a1_in1k")
    classes: PositiveInt | None = None
    new_head: bool = Field(False, description="begin with a new last layer, for other classes than the weights have")
    channels: Literal[1, 3] | None = None
    input_size: PositiveInt | None = Field(None, description="pixels of a side")
    mean: tuple[float, ...] | None = Field(None, description="of each channel, on [0, 1]")
    std: tuple[PositiveFloat, ...] | None = Field(None, description="of each channel, on [0, 1]")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop_pct: PositiveFloat | None = Field(None, le=1, description="share of a side that the cut middle keeps")
    crop_mode: Literal["center", "squash", "border"] | None = None
    model_args: dict[str, Any] | None = Field(None, description="further arguments of timm's architecture")
    label_names: tuple[str, ...] | None = Field(None, description="what the outputs stand for")

    def check(self) -> None:
        """Raise `UserError` for weights that cannot be opened, or without an architecture."""
        if self.weights == lite0.WORD:
            lite0.lite0_file()
        elif self.weights and self.weights.startswith(HUB):
            hub.check_id(self.weights.removeprefix(HUB))
        elif self.weights != TIMM:
            super().check()
        if not self.architecture and not self._names_its_architecture():
            raise UserError("'architecture' is needed, such as resnet18")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) != (self.channels or 3):
                raise UserError(f"{key} {list(values)} must have one number for each of {self.channels or 3} channels")

    def _names_its_architecture(self) -> bool:
        if self.weights is None or self.weights == TIMM:
            return False
        folder = at_home(self.weights)
        return self.weights == lite0.WORD or self.weights.startswith(HUB) or (folder / "config.json").is_file()

    def base(self, context: Context) -> Artifact:
        """The network at rest with every setting decided, so that later stages need neither hub nor defaults."""
        return super(TimmClassifier, self.resolved()).base(context)

    def resolved(self) -> Self:
        """These settings with what follows from the weights and the architecture filled in."""
        config = self._config()
        if self.architecture:
            config = {**timm_config.of_architecture(self.architecture), **config, "architecture": self.architecture}
        found = timm_config.settings(config, self.channels)
        own = {name: getattr(self, name) for name in found if getattr(self, name) is not None}
        return self.model_copy(update={**found, **own})

    def _config(self) -> dict[str, Any]:
        if self.weights == lite0.WORD:
            statistics = {"mean": (lite0.MEAN,) * 3, "std": (lite0.STD,) * 3}
            return {**timm_config.of_architecture(lite0.ARCHITECTURE), **statistics}
        folder = self._folder()
        return timm_config.of_folder(folder) if folder else {}

    def _folder(self) -> Path | None:
        if self.weights and self.weights.startswith(HUB):
            return hub.snapshot(self.weights.removeprefix(HUB))
        path = at_home(self.weights) if self.weights else None
        return path if path and path.is_dir() else None

    @property
    def outputs(self) -> int:
        """How many logits the network has."""
        return self.classes or 1000

    def network(self) -> Any:
        """timm's network of this architecture."""
        return self._built(num_classes=self.outputs)

    def _built(self, **more: Any) -> Any:
        import timm

        arguments = dict(self.model_args or {})
        if timm_config.of_architecture(str(self.architecture)).get("fixed_input_size"):
            arguments.setdefault("img_size", self.input_size)
        try:
            return timm.create_model(str(self.architecture), in_chans=self.channels, **arguments, **more)
        except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
            given = ", ".join(f"{key} {value}" for key, value in (arguments | more).items())
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"timm does not give {self.architecture!r} with {given}: {reason}") from None

    def pretrained(self) -> Mapping[str, Any] | None:
        """The tensors of the weights; with `new_head` those of the last layer are zeros."""
        if self.weights is None:
            return None
        network = self.network()
        state = self._state(network)
        return with_new_head(state, network, self.outputs) if self.new_head else state

    def _state(self, network: Any) -> Mapping[str, Any]:
        from llmq.models.state import read_state

        if self.weights == TIMM:
            state: Mapping[str, Any] = self._built(pretrained=True).state_dict()
            return state
        if self.weights == lite0.WORD:
            return lite0.state_of_lite0(self.model_copy(update={"classes": 1000, "channels": 3}).network())
        return read_state(str(self._folder() or self.weights))

    def source(self) -> str:
        """What tells these weights from others, and a person where they come from."""
        if self.weights == lite0.WORD:
            return f"{lite0.WORD}: {lite0.REQUIREMENT}, {sha256_files([lite0.lite0_file()])[:16]}"
        folder = self._folder()
        if folder and self.weights and self.weights.startswith(HUB):
            return f"{self.weights}, revision {folder.name}"
        own = f"timm's {self.weights}" if self.weights == TIMM else super().source()
        return f"{self.architecture}, {own}"

    def names(self) -> tuple[tuple[str, ...], ...]:
        """For each output what it may be called: of the labels that came with the weights, or of ImageNet."""
        if self.label_names:
            return tuple((name,) for name in self.label_names)
        return timm_config.known_names(self.outputs) if self.weights else ()

    def prepare(self, images: Sequence[Any]) -> Any:
        """Images scaled, their middle cut out, and normalized, as timm evaluates."""
        import torch
        from PIL import Image
        from timm.data import create_transform

        channels = self.channels or 3
        transform = create_transform(
            (channels, self.input_size, self.input_size),
            interpolation=self.interpolation or "bicubic",
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        pixels = (with_channels(image, channels) for image in images)
        return torch.stack([transform(Image.fromarray(p[..., 0] if channels == 1 else p)) for p in pixels])

    def example(self, batch_size: int) -> Any:
        """Normal noise of the input's size."""
        import torch

        shape = batch_size, self.channels or 3, self.input_size, self.input_size
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
