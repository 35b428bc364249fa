"""What timm, or a folder in timm's shape, says about an architecture: classes, input, normalization, names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.errors import UserError, did_you_mean
from llmq.models.hub import configuration

INPUT = ("mean", "std", "crop_pct", "crop_mode", "interpolation")


def of_architecture(name: str) -> dict[str, Any]:
    """timm's configuration of an architecture, or of one of its weights (`resnet18.a1_in1k`), by its own keys."""
    import timm

    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise UserError(f"timm has no architecture {plain!r}{did_you_mean(plain, timm.list_models())}")
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = [weights.partition(".")[2] for weights in timm.list_pretrained(f"{plain}.*")]
        raise UserError(f"timm has no weights {name!r}{did_you_mean(name.partition('.')[2], tags)}") from None
    return {"architecture": name, **(found.to_dict() if found else {})}


def of_folder(folder: Path) -> dict[str, Any]:
    """The configuration in a folder as timm writes one for the hub; empty if there is no `config.json`."""
    if not (folder / "config.json").is_file():
        return {}
    written = configuration(folder)
    if "architecture" not in written:
        raise UserError(f"{str(folder)!r}: its config.json names no timm 'architecture'; is it one of transformers?")
    keys = ("architecture", "num_classes", "label_names", "model_args")
    return {**written.get("pretrained_cfg", {}), **{key: written[key] for key in keys if key in written}}


def settings(config: Mapping[str, Any], channels: int | None) -> dict[str, Any]:
    """A configuration as fields of `models.timm_classifier`; grey input gets the mean of the colours' statistics."""
    there, *size = config.get("input_size") or (3, 224, 224)
    channels = channels or there
    found = {key: config[key] for key in INPUT if config.get(key) is not None}
    for key in ("mean", "std"):
        values = tuple(found.get(key) or (0.5,) * channels)
        found[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return {
        **found,
        "architecture": config["architecture"],
        "classes": config.get("num_classes") or 1000,
        "channels": channels,
        "input_size": max(size),
        "model_args": dict(config.get("model_args") or {}),
        "label_names": _labels(config),
    }


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    from timm.data import infer_imagenet_subset

    written = config.get("label_names") or ()
    if infer_imagenet_subset(dict(config)):
        return ()  # ImageNet's have plain names besides
    return tuple(written[key] for key in sorted(written, key=int)) if isinstance(written, dict) else tuple(written)


def known_names(classes: int) -> tuple[tuple[str, ...], ...]:
    """WordNet's key and the plain name of each class of ImageNet, for as many classes as one of its editions has."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    keys = info.label_names()
    plain = (info.label_name_to_description(key) for key in keys)
    return tuple((key, *reversed(name.split(", "))) for key, name in zip(keys, plain, strict=True))
