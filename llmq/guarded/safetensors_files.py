"""safetensors files: the header read and checked before any native code opens the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from llmq.errors import UserError
from llmq.guarded import json_files
from llmq.guarded.files import check_plain, library, unreadable

LONGEST = 100_000_000
"""Bytes of a header, as safetensors itself has it."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of a number of each dtype that safetensors 0.8 knows."""


class Entry(NamedTuple):
    """A tensor as the header tells of it; it lies from `begin` to `end` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header(file: Path) -> dict[str, Entry]:
    """Every tensor of a file by its name. Raises `UserError` for a file that is not whole."""
    size = check_plain(file)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(LONGEST, size - 8):
                raise _broken(file, "it has no header")
            text = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from None
    try:
        told = json_files.parse(text.decode(), str(file))
    except (UserError, UnicodeDecodeError):
        raise _broken(file, "its header is not JSON") from None
    if not isinstance(told, dict):
        raise _broken(file, "its header is no JSON object")
    found = {name: _entry(file, name, about) for name, about in told.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise _broken(file, f"{name[:80]!r} begins at byte {entry.begin}, and what is before it ends at {end}")
        end = entry.end
    if 8 + length + end != size:
        raise _broken(file, f"its header promises {8 + length + end} bytes, and it has {size}")
    return found


def _entry(file: Path, name: str, about: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = about["dtype"], about["shape"], about["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise _broken(file, f"of {name[:80]!r} it tells no dtype, shape and place") from None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise _broken(file, f"{name[:80]!r} has no shape and place in whole numbers")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _broken(file, f"{name[:80]!r} is of dtype {str(dtype)[:40]!r}, which is not known")
    if prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise _broken(file, f"{name[:80]!r} {shape} of {dtype} does not have {end - begin} bytes")
    return Entry(dtype, tuple(shape), begin, end)


def _broken(file: Path, why: str) -> UserError:
    return UserError(f"{str(file)!r} is not a whole safetensors file ({why}); copy or download it again")


@contextmanager
def opened(file: Path, framework: str = "pt") -> Iterator[Any]:
    """A file whose header was checked, open for its tensors."""
    from safetensors import safe_open

    header(file)
    with library(file, "safetensors file"), safe_open(file, framework) as tensors:
        yield tensors
