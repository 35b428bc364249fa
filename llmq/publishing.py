"""A stage on the hub: the files of the model and the card, and nothing of the machine."""

import json
import re
from collections.abc import Iterable, Set
from pathlib import Path

from llmq.errors import LlmqError, UserError, first_line
from llmq.files import BESIDE, CARD
from llmq.guarded.files import read_json_object
from llmq.terminal import say


def publish(stage: Path, repository: str, private: bool) -> str:
    """Upload the model of a stage, and return the address.

    Raises `UserError` for a folder that is no stage, holds no model, or names a base that only this machine has; and
    for a repository with weights that would be opened in place of, or on top of, the uploaded ones.
    """
    if not (stage / "artifact.json").is_file():
        stages = ", ".join(sorted(f.parent.name for f in stage.glob("[0-9]*-*/artifact.json")))
        cure = f"it is a run; name one of its stages: {stages}" if stages else "it has no artifact.json"
        raise UserError(f"{str(stage)!r} is no stage of llmq; {cure}")
    if repository.count("/") != 1:
        raise UserError(f"{repository!r} is no repository of the hub, which is called OWNER/NAME")
    beside = set(BESIDE) - {CARD}
    files = [f for f in sorted(stage.rglob("*")) if f.is_file() and f.relative_to(stage).parts[0] not in beside]
    if not any(f.suffix in (".safetensors", ".gguf", ".onnx", ".xml") for f in files):
        raise UserError(f"{str(stage)!r} holds no weights of its own; push the model that it was made of")
    _check_base(stage / "adapter_config.json")
    if not (stage / CARD).is_file():
        say(f"{stage} has no {CARD}: the repository will have no model card")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    hub = HfApi()
    try:
        made = hub.create_repo(repository, private=private, exist_ok=True)
        _check_there(repository, hub.list_repo_files(repository), {f.relative_to(stage).as_posix() for f in files})
        hub.upload_folder(
            repo_id=repository,
            folder_path=stage,
            allow_patterns=[f.relative_to(stage).as_posix() for f in files],
            commit_message="Upload by llmq",
        )
    except HFValidationError as error:
        raise UserError(f"{repository!r}: {first_line(error)}") from None
    except LlmqError:
        raise
    except Exception as error:  # noqa: BLE001 - of any kind: no network, no such owner, no right to it
        raise LlmqError(f"the hub does not take {repository!r}: {first_line(error)}") from None
    return str(made)


def _check_there(repository: str, there: Iterable[str], mine: Set[str]) -> None:
    """Raise `UserError` for safetensors of another upload, which transformers prefers to shards or adds to a model."""
    opened = re.compile(r"(adapter_)?model([.-].*)?\.safetensors(\.index\.json)?|adapter_config\.json")
    left = sorted(name for name in there if opened.fullmatch(name) and name not in mine)
    if left and any(map(opened.fullmatch, mine)):
        raise UserError(
            f"{repository!r} holds {left[0]!r} of another upload, which would be opened with this stage or in its "
            "place; delete it there, or push to a repository of its own"
        )


def _check_base(adapter: Path) -> None:
    """Raise `UserError` for an adapter whose base is a folder of this machine, which nobody else could open."""
    if not adapter.is_file():
        return
    base = str(read_json_object(adapter).get("base_model_name_or_path") or "")
    if Path(base).is_absolute():
        raise UserError(
            f"{str(adapter)!r} names the base {json.dumps(base)}, a folder of this machine; write the hub id of the "
            "base there, or push a merged stage (adapt.merge)"
        )
