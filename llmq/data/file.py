"""Rows of a local .jsonl, .json, .csv, .parquet or .txt file; the shape of the rows is recognised.

A .txt file is one text, whose last `held_out` share is set aside at a paragraph's or a line's end.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from llmq.errors import UserError
from llmq.guarded import parquet_files, strict_json
from llmq.text import rows
from llmq.types import Data, Split

READ_WHEN_CHECKED = 64 * 2**20  # bytes; reading more than that would make `llmq check` wait


class File(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    path: Path
    columns: dict[str, str] = Field({}, description="our column names -> the file's, such as {prompt: query}")
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the rows set aside")
    limit: int | None = Field(None, ge=1, description="use the first rows only")

    @classmethod
    def takes(cls, path: str) -> bool:
        return bool(Path(path).suffix)

    def check(self) -> None:
        kind = self._kind()
        if kind == ".txt":
            self.refuse_unread(("columns", "limit"), "on a .txt file, which is one text")
        if kind == ".parquet":
            parquet_files.check(self.path)
        elif self.path.stat().st_size <= READ_WHEN_CHECKED:
            self.read()

    def read(self) -> Split:
        """All rows, checked. A process reads a file once, and again only after a change."""
        self._kind()
        about = self.path.stat()
        return _read(self.model_dump_json(), (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))

    def read_anew(self) -> Split:
        kind = self._kind()
        try:
            if kind == ".txt":
                return self._text()
            return rows.split_of(READERS[kind](self.path), self.columns, str(self.path), self.held_out, self.limit)
        except UnicodeDecodeError:
            raise UserError(_not_utf8(self.path)) from None
        except OSError as error:
            raise UserError(f"{str(self.path)!r} cannot be read: {error.strerror or error}") from None

    def _kind(self) -> str:
        kind = self.path.suffix.lower()
        if kind not in READERS and kind != ".txt":
            raise UserError(f"{str(self.path)!r}: not a .jsonl, .json, .csv, .parquet or .txt file")
        if not self.path.is_file():
            raise UserError(f"there is no file {str(self.path)!r}")
        return kind

    def _text(self) -> Split:
        text = self.path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError(f"{self.path}: the file is empty")
        if "\0" in text:
            raise UserError(_nul(self.path, text.count("\n", 0, text.index("\0")) + 1))
        border = _border(text, round(len(text) * (1 - self.held_out))) if self.held_out else len(text)
        train: list[rows.Row] = [{"text": text[:border]}] if text[:border].strip() else []
        held_out: list[rows.Row] = [{"text": text[border:]}] if text[border:].strip() else []
        del text  # the text may fill most of the memory
        if train and held_out:  # the held-out part continues the training part
            held_out[0]["continues"] = True
        return rows.make_split(train, held_out, "text", {})


@lru_cache(maxsize=4)
def _read(settings: str, version: tuple[int, ...]) -> Split:
    # `version` only makes the cache miss after a change of the file.
    return File.model_validate_json(settings).read_anew()


def _border(text: str, wanted: int) -> int:
    """The place to cut a text: after the last paragraph or line that ends in the tenth before `wanted`.

    Else after the nearest line end, or the nearest blank. The two parts joined are the text again.
    """
    early = int(0.9 * wanted)
    for end in ("\n\n", "\n"):
        place = text.rfind(end, early, wanted)
        if place >= 0:
            return place + len(end)
    last = len(text.rstrip())  # a border after the last word would leave nothing to hold out
    for blank in (r"\n+", r"\s+"):
        borders = [m.end() for m in re.finditer(blank, text) if m.end() < last]
        if borders:
            return min(borders, key=lambda place: abs(place - wanted))
    return wanted


def _nul(path: Path, line: int) -> str:
    return f"{path}:{line}: a NUL byte, so this is no UTF-8 text; convert the file"


def _not_utf8(path: Path) -> str:
    # A stream decodes by blocks and counts bytes from the last one, so its error cannot say where in the file it was.
    data = path.read_bytes()
    for start, name in ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz")):
        if data.startswith(start):
            return f"{path}: compressed by {name}; unpack it first"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"{path}: not UTF-8 text but UTF-16; convert it first"
    for number, line in enumerate(data.splitlines(), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"{path}:{number}: not UTF-8 text: byte {error.start + 1} of the line is {line[error.start]:#x}"
    return f"{path}: not UTF-8 text"


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    name = str(path)
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{name}:{number}"
            text = line.strip(" \t\r\n")
            if not text:
                raise UserError(f"{where}: the line is empty; a JSONL file has one JSON object a line")
            try:
                value, end = strict_json.parse(text)
                if end < len(text):
                    raise json.JSONDecodeError("Extra data", text, end)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: column {error.colno}: not JSON: {error.msg.lower()}") from None
            except strict_json.NotPlain as error:
                raise UserError(f"{where}: {error}") from None
            yield where, value


def _json(path: Path) -> Iterator[tuple[str, object]]:
    text = path.read_text(encoding="utf-8-sig")
    row, place = 0, strict_json.skip_blanks(text, 0)
    try:
        if text[place : place + 1] != "[":
            strict_json.parse(text, place)
            raise UserError(f"{path}: a .json file of rows is a list of objects; use .jsonl for one object a line")
        place = strict_json.skip_blanks(text, place + 1)
        while row or text[place : place + 1] != "]":
            value, end = strict_json.parse(text, place)
            yield f"{path}: row {row}", value
            row, place = row + 1, strict_json.skip_blanks(text, end)
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = strict_json.skip_blanks(text, place + 1)
        after = strict_json.skip_blanks(text, place + 1)
        if after < len(text):
            raise json.JSONDecodeError("Extra data", text, after)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: column {error.colno}: not JSON: {error.msg.lower()}") from None
    except strict_json.NotPlain as error:
        raise UserError(f"{path}:{text.count(chr(10), 0, place) + 1}: row {row}: {error}") from None


def _csv(path: Path) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(2**31 - 1)  # a whole document may be one field
    lines: list[str] = []  # of the row that is being read
    over_several: list[tuple[int, list[int]]] = []  # first line of a row, and the fields in each of the lines
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(_kept(path, stream, lines), strict=True)
        try:
            head = next(reader, [])
            _check_head(path, head)
            lines.clear()
            for row in reader:
                first = reader.line_num - len(lines) + 1
                if len(row) != len(head):
                    raise UserError(f"{path}:{first}: the line has {len(row)} of the {len(head)} columns of the head")
                if len(lines) > 1:
                    over_several.append((first, [line.count(",") + 1 for line in lines]))
                yield f"{path}:{first}", dict(zip(head, row, strict=True))
                lines.clear()
        except csv.Error as error:
            raise UserError(_broken_csv(path, reader.line_num - len(lines) + 1, len(lines), str(error))) from None
    # The only field over several lines, and each of these lines would be a whole row: a quote was left open.
    if len(over_several) == 1 and len(over_several[0][1]) > 2 and set(over_several[0][1]) == {len(head)} != {1}:
        raise UserError(_broken_csv(path, over_several[0][0], len(over_several[0][1]), "each line would make a row"))


def _kept(path: Path, stream: Iterable[str], lines: list[str]) -> Iterator[str]:
    """The lines of a file; each is appended to `lines`, too. Raises `UserError` for a NUL byte."""
    for number, line in enumerate(stream, 1):
        lines.append(line)
        if "\0" in line:
            raise UserError(_nul(path, number))
        yield line


def _check_head(path: Path, head: list[str]) -> None:
    for i, name in enumerate(head):
        if name in head[:i]:
            raise UserError(f"{path}:1: the column {name[:40]!r} stands twice in the head")


def _broken_csv(path: Path, first: int, lines: int, why: str) -> str:
    if lines == 1:
        return f"{path}:{first}: not CSV: {why}; a quote within a quoted field is written twice"
    return (
        f"{path}:{first}: a quoted field begins here and goes over {lines} lines ({why}): "
        "close the quote, or write the file as .jsonl"
    )


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    _check_head(path, parquet_files.columns(path))
    for number, row in enumerate(parquet_files.rows(path)):
        yield f"{path}: row {number}", rows.without_absent_keys(row)


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
