"""GGUF files: all parts but the weights are checked in bounded steps before a library maps the file.

The library trusts the counts in a file: an array of 2^60 entries is read for ever, past the end of the file.
Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llmq.errors import UserError
from llmq.guarded.files import check_plain, unreadable

if TYPE_CHECKING:
    from gguf import GGUFReader

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each scalar type of a value; 8 is a string and 9 an array."""
STRING, ARRAY = 8, 9
MOST_VALUES, MOST_TENSORS, MOST_AXES = 100_000, 1_000_000, 4
LONGEST_NAME = 2**16
ALIGNMENT = "general.alignment"
ENDS = ("eos", "eot", "eom")
"""The keys of a file for tokens that end a text: engines stop at all of them."""


@dataclass
class _Reader:
    """A stream that refuses to read past the end of the file."""

    file: Path
    stream: BinaryIO
    size: int

    def broken(self, why: str) -> UserError:
        return UserError(f"{str(self.file)!r} is not a whole GGUF file ({why}); copy or download it again")

    def skip(self, count: int, what: str) -> None:
        """Skip `count` bytes. Raises `UserError` past the end of the file."""
        if count > self.size - self.stream.tell():
            raise self.broken(f"{what} goes past its end")
        self.stream.seek(count, 1)

    def number(self, form: str, what: str) -> int:
        data = self.stream.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise self.broken(f"it ends within {what}")
        return int(struct.unpack(form, data)[0])

    def name(self, what: str, seen: set[str]) -> str:
        """Read a name and add the name to `seen`. Raises `UserError` for a name that stands twice."""
        length = self.number("<Q", what)
        if length > LONGEST_NAME:
            raise self.broken(f"{what} of {length} bytes")
        self.skip(length, what)
        self.stream.seek(-length, 1)
        try:
            name = self.stream.read(length).decode()
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not UTF-8 text") from None
        if name in seen:
            raise self.broken(f"{name[:80]!r} stands twice")
        seen.add(name)
        return name

    def value(self, kind: int, name: str) -> None:
        """Skip a value of type `kind`, which may be an array."""
        if kind == STRING:
            self.skip(self.number("<Q", name), name)
        elif kind == ARRAY:
            inner, count = self.number("<I", name), self.number("<Q", name)
            if inner in SIZES:
                self.skip(SIZES[inner] * count, name)
            elif inner == STRING and 8 * count <= self.size:
                for _ in range(count):
                    self.value(STRING, name)
            else:
                raise self.broken(f"{name!r} is an array of type {inner} with {count} entries")
        elif kind in SIZES:
            self.skip(SIZES[kind], name)
        else:
            raise self.broken(f"{name!r} is of type {kind}")


def check(file: Path) -> int:
    """The number of weights in a file. Raises `UserError` for a file whose parts do not fit into it."""
    return _read(file)[0]


def stored(file: Path) -> dict[str, int]:
    """The bytes of all tensors of each type in a file: `{"Q4_0": 18}`. Raises `UserError` as `check` does."""
    return _read(file)[1]


def _read(file: Path) -> tuple[int, dict[str, int]]:
    size = check_plain(file)
    try:
        with file.open("rb") as stream:
            return _check(_Reader(file, stream, size))
    except OSError as error:
        raise unreadable(file, error) from None


def _check(reader: _Reader) -> tuple[int, dict[str, int]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if reader.stream.read(4) != b"GGUF":
        raise reader.broken("its first bytes are not GGUF")
    version = reader.number("<I", "its version")
    if version not in (2, 3):
        raise reader.broken(f"version {version}; 2 and 3 are read")
    tensors, values = reader.number("<Q", "its counts"), reader.number("<Q", "its counts")
    if tensors > MOST_TENSORS or values > MOST_VALUES:
        raise reader.broken(f"it promises {tensors} tensors and {values} values")
    seen: set[str] = set()
    alignment = 32
    for _ in range(values):
        name = reader.name("the name of a value", seen)
        kind = reader.number("<I", name)
        if name == ALIGNMENT:
            alignment = reader.number("<I", name) if kind == 4 else 0
            if not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
                raise reader.broken(f"{ALIGNMENT} is {alignment}")
        else:
            reader.value(kind, name)
    places, total, sizes = [], 0, Counter[str]()
    blocks = {int(kind): block for kind, block in GGML_QUANT_SIZES.items()}
    seen.clear()
    for _ in range(tensors):
        name = reader.name("the name of a tensor", seen)
        axes = reader.number("<I", name)
        if axes > MOST_AXES:
            raise reader.broken(f"{name!r} has {axes} axes")
        shape = [reader.number("<Q", name) for _ in range(axes)]
        kind, offset = reader.number("<I", name), reader.number("<Q", name)
        if kind not in blocks:
            raise reader.broken(f"{name!r} is of type {kind}")
        count = prod(shape)
        block, of_block = blocks[kind]
        if not shape or shape[0] % block or not 0 < count <= 2**40 or offset % alignment:
            raise reader.broken(f"{name!r} {shape} does not consist of whole blocks")
        places.append((name, offset, count // block * of_block))
        sizes[GGMLQuantizationType(kind).name] += count // block * of_block
        total += count
    data = -(-reader.stream.tell() // alignment) * alignment
    for name, offset, length in places:
        if data + offset + length > reader.size:
            raise reader.broken(f"{name!r} goes past its end")
    return total, dict(sizes)


def ends(file: Path) -> list[int]:
    """The tokens that end a text by the keys of a checked file, the tokenizer's own first."""
    from gguf import GGUFReader

    fields = GGUFReader(str(file)).fields  # as transformers names it, so that the file is parsed once
    said = (fields.get(f"tokenizer.ggml.{key}_token_id") for key in ENDS)
    return list(dict.fromkeys(int(field.contents()) for field in said if field is not None))


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let a checked GGUF file be parsed once, by the path as text, and its names be listed once.

    transformers parses it for the configuration, the tensors and the tokenizer, and lists the names for every module:
    15 of the 21 seconds of a conversion. Half of a parse is numpy's accounts of slices of mapped files.
    """
    import gguf
    import numpy as np

    if hasattr(gguf.GGUFReader, "cache_clear"):  # within another such block
        yield
        return
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}

    def get(reader: "GGUFReader", *where: object, **how: object) -> object:
        reader.data = np.asarray(reader.data)
        return kept["GGUFReader"]._get(reader, *where, **how)

    plain = type("Plain", (gguf.GGUFReader,), {"_get": get})
    try:
        for name, made in (kept | {"GGUFReader": plain}).items():
            setattr(gguf, name, lru_cache(maxsize=2)(made))
        yield
    finally:
        for name, made in kept.items():
            setattr(gguf, name, made)
