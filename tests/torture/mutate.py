"""Accidents of bytes, texts and nested data."""

import copy
import json
import math
import os
import random
from pathlib import Path
from typing import Any

BYTES = [
    b'"', b"\\ud800", b"\xff", b"\0", b"\r", b"\n", b"{", b"[", b"}", b"]", b",", b"NaN", b"1e999", b"\xef\xbb\xbf",
    b"9" * 5000, b"[" * 5000, b'{"a":' * 3000, b"null", b"true", b'""', b"\xe2\x80\xa8", b"-", b"PAR1", b"\x1f\x8b",
    b"\x1b[31m", b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, b"\x80" + b"\0" * 7,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10_000_000, -(2**70), 0.5, 1e308, -0.0, math.inf, math.nan, "", " ",
    "x", "a" * 3000, "../../etc/passwd", "/dev/zero", "~nobodyx/y", "\x1b[31mred", "{{1/0}}", "[/x]", "1e999", [], {},
    [[]], [None], {"": None}, {"a": {"b": [1]}}, ["x"] * 50, int("9" * 300), "é" * 20, "\ud83d", "nan", "auto",
]  # fmt: skip


def of_bytes(content: bytes, dice: random.Random) -> bytes:
    """The content after a few accidents."""
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(content) + 1)
        length = dice.choice([0, 1, 1, 2, 4, 8, 64, len(content)])
        put = dice.choice([b"", dice.choice(BYTES), dice.randbytes(dice.randint(1, 8)), content[place : place + 20]])
        content = content[:place] + put + content[place + length :]
    return content


def of_flips(content: bytes, dice: random.Random, head: int) -> bytes:
    """The content with a few bits turned, most of them in its first or last `head` bytes, where formats are told."""
    changed = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        if changed:
            near = dice.randrange(min(head, len(changed)))
            place = dice.choice([near, len(changed) - 1 - near, dice.randrange(len(changed))])
            changed[place] = dice.choice([changed[place] ^ (1 << dice.randrange(8)), dice.randrange(256), 255, 0])
    return bytes(changed)


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of nested data stands."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(place for key, value in items for place in places(value, (*at, key)))]


def of_data(data: Any, dice: random.Random) -> Any:
    """A copy of nested data with a few values changed, taken away, doubled, or renamed."""
    data = copy.deepcopy(data)
    for _ in range(dice.randint(1, 3)):
        known = [place for place in places(data) if place]
        if not known:
            return dice.choice(VALUES)
        *path, key = dice.choice(known)
        parent = data
        for step in path:
            parent = parent[step]
        kind = dice.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(key)[:-1] + dice.choice("xyz_")] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent.insert(0, copy.deepcopy(parent[key]))
        elif kind == 3:
            parent[key] = copy.deepcopy(dice.choice([_at(data, place) for place in known]))
        elif kind == 4 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = dice.choice([-parent[key], parent[key] + 1, parent[key] * 1000, str(parent[key]), 0])
        else:
            parent[key] = copy.deepcopy(dice.choice(VALUES))
    return data


def _at(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


def of_json(content: bytes, dice: random.Random) -> bytes:
    """A JSON file changed as data or as bytes."""
    if dice.random() < 0.3:
        return of_bytes(content, dice)
    return json.dumps(of_data(json.loads(content), dice)).encode("utf-8", "surrogatepass")


def of_file(path: Path, dice: random.Random) -> None:
    """Something else where a file was: nothing, a folder, a pipe, a device, a link to nowhere or to itself."""
    path.unlink()
    kind = dice.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(dice.choice(["/dev/zero", "/dev/full", "/", "nowhere"]))
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.write_bytes(b"")
