"""Rows of a local file."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from llmq.data import rows
from llmq.errors import UserError
from llmq.types import Data, Split

READ_WHEN_CHECKED = 64 * 2**20  # bytes; reading more than that would make `llmq check` wait


class File(Data):
    """Rows of a local .jsonl, .json, .csv, .parquet or .txt file; the shape of the rows is recognised.

    A .txt file is one text, whose last `held_out` share is set aside at a paragraph's end.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    path: Path
    columns: dict[str, str] = Field({}, description="our column names -> the file's, such as {prompt: query}")
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the rows set aside")
    limit: int | None = Field(None, ge=1, description="use the first rows only")

    @classmethod
    def takes(cls, path: str) -> bool:
        """A path with a suffix."""
        return bool(Path(path).suffix)

    def check(self) -> None:
        """See `Data.read`; files up to 64 MB are read whole."""
        if self.path.suffix not in READERS and self.path.suffix != ".txt":
            raise UserError(f"{str(self.path)!r}: not a .jsonl, .json, .csv, .parquet or .txt file")
        if not self.path.is_file():
            raise UserError(f"there is no file {str(self.path)!r}")
        if self.path.suffix == ".parquet":
            _check_parquet(self.path)
        elif self.path.stat().st_size <= READ_WHEN_CHECKED:
            self.read()

    def read(self) -> Split:
        """All rows, checked. Raises `UserError` naming file, line and column of the first bad one."""
        try:
            if self.path.suffix == ".txt":
                return self._text()
            raw = READERS[self.path.suffix](self.path)
            checked, shape = rows.check(raw, self.columns, str(self.path))
        except UnicodeDecodeError:
            raise UserError(_not_utf8(self.path)) from None
        return rows.split(checked, shape, self.held_out, self.limit)

    def _text(self) -> Split:
        text = self.path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError(f"{self.path}: the file is empty")
        wanted = round(len(text) * (1 - self.held_out))
        # The end of a paragraph within the tenth before the wanted place, or that place.
        paragraph = text.rfind("\n\n", int(0.9 * wanted), wanted) if self.held_out else -1
        end, start = (paragraph, paragraph + 2) if paragraph >= 0 else (wanted, wanted)
        parts = [[{"text": t}] if t.strip() else [] for t in (text[:end], text[start:])]
        return rows.make_split(parts[0], parts[1], "text", {})


def _not_utf8(path: Path) -> str:
    # A stream decodes by blocks and counts bytes from the last one, so its error cannot say where in the file it was.
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"{path}:{number}: not UTF-8 text: byte {error.start + 1} of the line is {line[error.start]:#x}"
    return f"{path}: not UTF-8 text"


def _check_parquet(path: Path) -> None:
    with path.open("rb") as stream:
        first = stream.read(4)
        stream.seek(max(0, path.stat().st_size - 4))
        if first != b"PAR1" or stream.read() != b"PAR1":
            raise UserError(f"{str(path)!r} is not a whole .parquet file")


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{path}:{number}"
            if not line.strip():
                raise UserError(f"{where}: the line is empty; a JSONL file has one JSON object a line")
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: column {error.colno}: not JSON: {error.msg.lower()}") from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: column {error.colno}: not JSON: {error.msg.lower()}") from None
    if not isinstance(data, list):
        raise UserError(f"{path}: a .json file of rows is a list of objects; use .jsonl for one object a line")
    yield from ((f"{path}: row {i}", row) for i, row in enumerate(data))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a whole document may be one field
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        head = next(reader, [])
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if len(row) != len(head):
                raise UserError(f"{where}: the line has {len(row)} of the {len(head)} columns of the head")
            yield where, dict(zip(head, row, strict=True))


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset

    data = Dataset.from_parquet(str(path))
    yield from ((f"{path}: row {i}", row) for i, row in enumerate(data))


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
