"""An image classifier of timm: random, given weights, the hub's, timm's own, or `efficientnet-lite0`.

Unset settings follow from the configuration of the weights, or else from that of the architecture in timm. Images with
another number of channels are repeated (grey) or mixed to luma (colour), then scaled and cut as timm evaluates.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.errors import UserError, did_you_mean
from llmq.files import at_home, sha256_files
from llmq.types import JsonObject
from llmq.vision import efficientnet_lite0 as lite0
from llmq.vision import hub
from llmq.vision.classifier import Classifier, as_timm_evaluates, with_new_head
from llmq.vision.family import noise
from llmq.vision.state import read_state

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from torch.nn import Module

HUB = "hf-hub:"  # timm's prefix for weights on the hub
TIMM = "pretrained"  # the word for timm's own weights
INPUT = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
Config = Mapping[str, Any]
"""The configuration of an architecture or of its weights, by timm's own keys."""


class TimmClassifier(Classifier):
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
    model_args: JsonObject | None = Field(None, description="further arguments of timm's architecture")
    label_names: tuple[str, ...] | None = Field(None, description="the names of the outputs")

    @property
    def _on_hub(self) -> str:
        """The name of the weights on the hub; empty for weights from elsewhere."""
        weights = self.weights or ""
        return weights.removeprefix(HUB) if weights.startswith(HUB) else ""

    def check(self) -> None:
        if self.weights == lite0.WORD:
            lite0.lite0_file()
        elif self._on_hub:
            hub.check_id(self._on_hub)
        elif self.weights != TIMM:
            super().check()
        named = self.weights == lite0.WORD or bool(self._on_hub)
        if not named and self.weights not in (None, TIMM):
            named = (at_home(str(self.weights)) / "config.json").is_file()
        if not self.architecture and not named:
            raise UserError("'architecture' is needed, such as resnet18")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) != (self.channels or 3):
                raise UserError(f"{key} {list(values)} must have one number for each of {self.channels or 3} channels")

    def resolved(self) -> Self:
        config = self._config()
        if self.architecture:
            config = {**of_architecture(self.architecture), **config, "architecture": self.architecture}
        if "architecture" not in config:
            where = f", and {self.weights!r} is no folder whose config.json names one" if self.weights else ""
            raise UserError(f"'architecture' is needed, such as resnet18{where}")
        settings = _settings(config, self.channels)
        own = {name: value for name in settings if (value := getattr(self, name)) is not None}  # set by the user
        return self.model_copy(update={**settings, **own})

    def _config(self) -> Config:
        if self.weights == lite0.WORD:
            statistics = {"mean": (lite0.MEAN,) * 3, "std": (lite0.STD,) * 3}
            return {**of_architecture(lite0.ARCHITECTURE), **statistics}
        folder = self._folder()
        if not folder or not (folder / "config.json").is_file():
            return {}
        written: Config = hub.configuration(folder)
        if "architecture" not in written:
            raise UserError(
                f"{str(folder)!r}: its config.json names no timm 'architecture'; is it one of transformers?"
            )
        keys = ("architecture", "num_classes", "label_names", "model_args")
        return {**written.get("pretrained_cfg", {}), **{key: written[key] for key in keys if key in written}}

    def _folder(self) -> Path | None:
        if self._on_hub:
            return hub.snapshot(self._on_hub)
        path = at_home(self.weights) if self.weights else None
        return path if path and path.is_dir() else None

    @property
    def outputs(self) -> int:
        return self.classes or 1000

    def network(self) -> "Module":
        return self._built(num_classes=self.outputs)

    def _built(self, **more: object) -> "Module":
        import timm

        arguments = dict(self.model_args or {})
        if of_architecture(str(self.architecture)).get("fixed_input_size"):
            arguments.setdefault("img_size", self.input_size)  # such networks are built for one size
        try:
            network: Module = timm.create_model(str(self.architecture), in_chans=self.channels, **arguments, **more)
        except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
            given = ", ".join(f"{key} {value}" for key, value in (arguments | more).items())
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"timm does not give {self.architecture!r} with {given}: {reason}") from None
        return network

    def pretrained(self) -> "Mapping[str, Tensor] | None":
        if self.weights is None:
            return None
        network = self.network()
        if self.weights == TIMM:
            state = self._built(pretrained=True).state_dict()
        elif self.weights == lite0.WORD:
            state = lite0.state_of_lite0(self.model_copy(update={"classes": 1000, "channels": 3}).network())
        else:
            state = read_state(str(self._folder() or self.weights))
        return with_new_head(state, network, self.outputs) if self.new_head else state

    def source(self) -> str:
        if self.weights == lite0.WORD:
            return f"{lite0.WORD}: {lite0.REQUIREMENT}, {sha256_files([lite0.lite0_file()])[:16]}"
        if self._on_hub and (folder := self._folder()):
            return f"{self.weights}, revision {folder.name}"
        own = f"timm's {self.weights}" if self.weights == TIMM else super().source()
        return f"{self.architecture}, {own}"

    def names(self) -> tuple[tuple[str, ...], ...]:
        """The labels that came with the weights, or the labels of ImageNet."""
        if self.label_names:
            return tuple((name,) for name in self.label_names)
        return known_names(self.outputs) if self.weights else ()

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        """Scale images, cut out the middle, and normalize, as timm evaluates."""
        channels, side = self.channels or 3, self.input_size or 224
        return as_timm_evaluates(
            images,
            channels,
            (side, side),
            self.mean or (0.5,) * channels,
            self.std or (0.5,) * channels,
            interpolation=self.interpolation or "bicubic",
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def example(self, batch_size: int) -> "Tensor":
        side = self.input_size or 224
        return noise(batch_size, self.channels or 3, side, side)


def of_architecture(name: str) -> Config:
    """timm's configuration of an architecture or of its weights (`resnet18.a1_in1k`). Raises `UserError` for others."""
    import timm

    plain = name.partition(".")[0]  # without the tag of the weights
    if not timm.is_model(plain):
        raise UserError(f"timm has no architecture {plain!r}{did_you_mean(plain, timm.list_models())}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = [weights.partition(".")[2] for weights in timm.list_pretrained(f"{plain}.*")]
        raise UserError(f"timm has no weights {name!r}{did_you_mean(name.partition('.')[2], tags)}") from None
    return {"architecture": name, **(config.to_dict() if config else {})}


def _settings(config: Config, channels: int | None) -> JsonObject:
    """A configuration as fields of the model; grey input gets the mean of the statistics of colours."""
    from timm.data import infer_imagenet_subset

    there, *size = config.get("input_size") or (3, 224, 224)  # (channels, height, width)
    channels = channels or there
    settings = {key: config[key] for key in INPUT if config.get(key) is not None}
    for key in ("mean", "std"):
        values = tuple(settings.get(key) or (0.5,) * channels)
        settings[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    labels = config.get("label_names") or ()
    if infer_imagenet_subset(dict(config)):
        labels = ()  # `known_names` adds plain names to them
    if isinstance(labels, dict):
        labels = [labels[key] for key in sorted(labels, key=int)]
    return {
        **settings,
        "architecture": config["architecture"],
        "classes": config.get("num_classes") or 1000,
        "channels": channels,
        "input_size": max(size),
        "model_args": dict(config.get("model_args") or {}),
        "label_names": tuple(labels),
    }


def known_names(classes: int) -> tuple[tuple[str, ...], ...]:
    """The WordNet key and the plain names of each class of ImageNet; empty unless an edition has so many classes."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    keys = info.label_names()
    plain = (info.label_name_to_description(key) for key in keys)
    return tuple((key, *reversed(name.split(", "))) for key, name in zip(keys, plain, strict=True))
