"""A model's folder, looked at before any library opens it."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmq.files import safetensors_of
from llmq.guarded import configuration, json_files, safetensors_files
from llmq.guarded.files import check_plain_folder, library

if TYPE_CHECKING:
    from llmq.artifact import Artifact
    from llmq.types import Loaded


def opened(artifact: "Artifact", device: str) -> "Loaded":
    """An artifact opened by its family, its files looked at first. Raises `UserError` where a library cannot."""
    for folder in filter(None, (artifact.weights, artifact.adapter)):
        check(folder)
    with library(artifact.weights, f"model that {artifact.model.word} opens"):
        return artifact.model.open(artifact, device)


def check(place: Path) -> None:
    """Raise `UserError` for pipes, broken headers, and configurations that are none or ask for absurd networks."""
    if not place.is_dir():
        return
    check_plain_folder(place)
    for file in safetensors_of(place):
        safetensors_files.header(file)
    if (place / "config.json").exists():
        configuration.check(place)
    if (place / "adapter_config.json").exists():
        json_files.read_object(place / "adapter_config.json")
