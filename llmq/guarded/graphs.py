"""The graph of OpenVINO in a folder, checked before the library maps its constants into memory."""

import math
from collections.abc import Mapping
from pathlib import Path

from llmq.errors import UserError

BITS = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16, "boolean": 8, "i4": 4, "u4": 4, "u1": 1}
BITS |= {f"{sign}{bits}": bits for sign in "iu" for bits in (8, 16, 32, 64)}  # i8, u8, i16, …
"""The bits of one stored number, by OpenVINO's names of dtypes."""


def check_graph(file: Path) -> None:
    """Raise `UserError` unless a graph is whole and its constants lie inside the file beside it.

    OpenVINO maps that file into memory: a truncated file would crash the process.
    """
    from xml.etree import ElementTree

    constants_file = file.with_suffix(".bin")
    for needed in (file, constants_file):
        if not needed.is_file():
            raise UserError(f"{str(file.parent)!r} lacks {needed.name!r}; make the stage again")
    try:
        root = ElementTree.parse(file).getroot()
        ends = {
            str(layer.get("name")): _end(data.attrib)
            for layer in root.iter("layer")
            for data in layer.iter("data")
            if "offset" in data.attrib
        }
    except (ElementTree.ParseError, ValueError, KeyError, UnicodeError) as error:
        raise UserError(f"{str(file)!r} is no whole graph of OpenVINO: {error}; make the stage again") from None
    if root.tag != "net" or not ends:
        raise UserError(f"{str(file)!r} is no graph of OpenVINO with constants; make the stage again")
    size, end = constants_file.stat().st_size, max(ends.values())
    if end != size:
        cut = [name for name, last in ends.items() if last > size]
        told = f"; {len(cut)} constants lie beyond its end, first {cut[0]!r}" if cut else ""
        raise UserError(f"{str(constants_file)!r} has {size} bytes, and its graph tells of {end}{told}")


def _end(data: Mapping[str, str]) -> int:
    """The end of a constant in the file, in bytes. Raises `ValueError` if the size does not fit the shape."""
    offset, size = int(data["offset"]), int(data["size"])
    bits = BITS.get(data["element_type"])
    numbers = math.prod(int(n) for n in data["shape"].split(",") if n.strip())
    if min(offset, size) < 0 or (bits and size != -(-numbers * bits // 8)):  # in whole bytes
        raise ValueError(f"a constant {data['element_type']} of shape {data['shape']!r} has {size} bytes")
    return offset + size
