"""Parquet files, in batches of bounded size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmq.errors import UserError, one_line
from llmq.faults import is_of_machine
from llmq.guarded.files import check_plain, unreadable

MARK = b"PAR1"
BATCH = 1000
LARGEST = 4 * 2**30
"""Bytes of a group of rows once unpacked; a broken file may promise any number, and Arrow allocates it."""


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
    """The names of the columns."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def rows(path: Path) -> Iterator[dict[str, Any]]:
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
        if is_of_machine(error) and not _promises_too_much(path):
            raise
        raise UserError(f"{path}: from row {number}: cannot be read: {one_line(error)[:120]}") from None


def _opened(path: Path) -> Any:
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


def _promises_too_much(path: Path) -> bool:
    """Whether a file that Arrow found no memory for is small: no sound file unpacks to a thousand times its size."""
    return path.stat().st_size < 2**20
