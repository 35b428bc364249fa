"""The contract of `llmq predict`: the settings and the work of one kind of models, and the files that are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pydantic import ValidationError

from llmq.errors import UserError, explain, one_line
from llmq.terminal import say
from llmq.types import JsonObject, Settings

if TYPE_CHECKING:
    from llmq.types import Loaded

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""The suffixes of pictures that are taken from a folder; a file that is named itself may have any."""


@dataclass(frozen=True)
class Input:
    """A file to be read; `place` is the path relative to the folder in which the file was found."""

    path: Path
    place: Path
    name: str
    """The place as text; bytes that are no UTF-8 are written as numbers."""


@dataclass
class Inputs:
    """The files of one prediction; bad ones end it, or are left out and named where `skip_bad` says so."""

    items: list[Input]
    skip_bad: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    """The name of what was left out, and why."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """The files of folders that are no input, counted by the reason."""

    @contextmanager
    def bad_skipped(self, what: str) -> Iterator[None]:
        """Name and leave out `what` where the block raises a `UserError`, unless that is to end the prediction."""
        try:
            yield
        except UserError as error:
            if not self.skip_bad:
                raise
            self.skipped[what] = one_line(error)
            say(f"skipped: {one_line(error)}")


class Predictor(Settings):
    """The settings of a prediction by one kind of models, and the work; the fields are the options of the command."""

    suffixes: ClassVar[frozenset[str]] = frozenset()
    """The suffixes of files that are taken from a folder; empty for a kind that reads no file."""

    @property
    def reads_files(self) -> bool:
        """True if there is nothing to do without a file."""
        return bool(self.suffixes)

    def check(self, item: Input, model: object) -> None:
        """Raise `UserError` for a file that cannot be read, or not by this model; called before the model is opened."""

    def targets(self, item: Input) -> list[Path]:
        """The files, relative to the folder of answers, that are made of a sound file alone."""
        return [item.place]

    def write(self, loaded: Loaded, inputs: Inputs, folder: Path) -> int:
        """Write the answers about all inputs into an empty folder, and return their number."""
        raise NotImplementedError


P = TypeVar("P", bound=Predictor)


def settings(kind: type[P], options: JsonObject) -> P:
    """The predictor with these options. Raises `UserError` for a value that does not fit."""
    try:
        return kind(**options)
    except ValidationError as error:
        raise UserError(f"--{explain(error.errors()[:1], None)}".replace("_", "-")) from None
