"""Image models on the Hugging Face hub: which folder they become on this machine."""

import json
import re
from pathlib import Path
from typing import Any

from llmq.errors import UserError

PATTERNS = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]


def check_id(name: str) -> None:
    """Raise `UserError` unless `name` can be a hub repository: `owner/name`, or `owner/name@revision`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name.startswith("."):
        raise UserError(f"{name!r} is no local folder and no hub id (owner/name, or owner/name@revision)")


def snapshot(name: str) -> Path:
    """The repository in the local hub cache, brought there if need be: configuration and safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"the hub does not give {name!r}: {str(error).strip().splitlines()[0]}") from None
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{name!r} on the hub has no *.safetensors, and pickled weights are not opened from there")
    return folder


def configuration(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """A JSON object of a folder. Raises `UserError` if it is not there or broken."""
    path = folder / file
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{str(folder)!r} has no {file}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no JSON object")
    return data
