"""What lm-eval's task files say, read as text: importing the harness and indexing its 14,000 files takes far longer."""

import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmq.errors import UserError, did_you_mean
from llmq.files import bundled

OURS = bundled("evals") / "lm_eval"
NAME = re.compile(r"^[ \t\"]*(?:task|group|tag)\"?: *['\"]?([^\s'\"#\[]+)", re.MULTILINE)


def check_names(names: Iterable[str], include_path: Path | None) -> None:
    """Raise `UserError` for the first name that stands in no task file, neither of ours nor of lm-eval's."""
    own = " ".join(_texts(OURS, include_path))
    unseen = [name for name in names if not _stands_in(name, own)]
    if not unseen:
        return
    spec = importlib.util.find_spec("lm_eval")
    harness = " ".join(_texts(Path(spec.origin).parent / "tasks" if spec and spec.origin else None))
    for name in unseen:
        if not _stands_in(name, harness):
            raise UserError(f"lm_eval has no task {name!r}{did_you_mean(name, NAME.findall(own + harness))}")


def _texts(*folders: Path | None) -> Iterator[str]:
    for folder in folders:
        for file in folder.rglob("*") if folder else ():
            if file.is_file() and file.suffix in ("", ".yaml", ".yml", ".py"):  # templates have no suffix
                yield file.read_text(encoding="utf-8", errors="replace")


def _stands_in(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None
