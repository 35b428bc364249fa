"""Parquet files, in batches of bounded size."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError, is_of_machine, one_line
from llmq.guarded.files import check_plain, unreadable

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MARK = b"PAR1"
BATCH = 1000
LARGEST = 4 * 2**30
"""The most bytes of an unpacked row group: Arrow allocates any number that a broken file states."""


def check(path: Path) -> None:
    """Raise `UserError` unless a file begins and ends as Parquet does."""
    size = check_plain(path)
    try:
        with path.open("rb") as stream:
            first = stream.read(4)
            stream.seek(max(0, size - 4))
            whole = size >= 12 and first == MARK == stream.read()
    except OSError as error:
        raise unreadable(path, error) from None
    if not whole:
        raise UserError(f"{str(path)!r} is not a whole .parquet file")


def columns(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def rows(path: Path) -> Iterator[dict[str, object]]:
    """Every row. Raises `UserError` that names the first row that cannot be read."""
    number = 0
    try:
        with _opened(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    yield row
                    number += 1
    except (UserError, GeneratorExit):
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path}: from row {number}: a text is not UTF-8") from None
    except Exception as error:  # Arrow's own kinds, and those of Python's conversions: Overflow, Value, Type, Key …
        # A small file for which memory runs out states wrong sizes: none unpacks to so much.
        if is_of_machine(error) and path.stat().st_size >= 2**20:
            raise
        raise UserError(f"{path}: from row {number}: cannot be read: {one_line(error)[:120]}") from None


def _opened(path: Path) -> "ParquetFile":
    from pyarrow import parquet

    check(path)
    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{path}: from row 0: cannot be read: {one_line(error)[:120]}") from None
    if any(not 0 <= group.total_byte_size <= LARGEST or group.num_rows < 0 for group in groups):
        raise UserError(f"{path}: a group of its rows has more than {LARGEST} bytes, or less than none")
    return file
