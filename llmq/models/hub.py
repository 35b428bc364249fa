"""Image models on the Hugging Face hub: which folder they become on this machine."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.guarded import configuration as sizes
from llmq.guarded import json_files
from llmq.models.state import check_kinds, files_of, read_state, refused

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
    files_of(folder)
    return folder


def opened(auto: Any, folder: Path, weights: str) -> Any:
    """What a class of transformers opens of a folder, in float32: it renames what older files call otherwise.

    Raises `UserError` that names what the folder lacks, what of it has no place, and what is of another shape or kind:
    transformers makes the first random, leaves out the second, and says so in a log.
    """
    files = read_state(str(folder))
    try:
        from transformers import AutoConfig

        config = with_architectures(AutoConfig.from_pretrained(folder))
        model, said = auto.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            dtype="float32",
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{weights!r} is not opened by transformers: {' '.join(str(error).split())[:300]}") from None
    own = model.state_dict() | dict(model.named_buffers())
    # A fixed normalization counts no batches, whatever its file says; nor is a count that is missing ever read.
    left = [n for n in said["unexpected_keys"] if n not in own and not _counts(n, own)]
    missing = [n for n in said["missing_keys"] if not _counts(n, own)]
    if missing or left or said["mismatched_keys"]:
        shapes = sorted((name, tuple(there), tuple(here)) for name, there, here in said["mismatched_keys"])
        raise refused(weights, sorted(missing), sorted(left), shapes)
    if errors := said.get("error_msgs"):
        raise UserError(f"{weights!r} is not opened by transformers: {' '.join(str(errors[0]).split())}")
    check_kinds(own, files, weights)
    return model


def with_architectures(config: Any) -> Any:
    """A configuration of which transformers finds the class: where a family has two, such as DeiT, it reads a list."""
    config.architectures = config.architectures or []
    return config


def _counts(name: str, own: Mapping[str, Any]) -> bool:
    """Whether a tensor counts the batches that a normalization has seen."""
    layer, _, leaf = name.rpartition(".")
    return leaf == "num_batches_tracked" and f"{layer}.running_mean" in own


def configuration(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """A JSON object of a folder. Raises `UserError` if it is not there or broken."""
    if not (folder / file).exists():
        raise UserError(f"{str(folder)!r} has no {file}")
    return sizes.check(folder) if file == "config.json" else json_files.read_object(folder / file)
