"""Layers that serving engines multiply as one: their files keep each by itself, and one grid must serve all of them."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The names in vLLM and SGLang -> the layers of the files. Phi's, and others, are fused in their files already."""
Grid = TypeVar("Grid")


def alike(grids: Mapping[str, Grid]) -> Iterator[tuple[str, Grid]]:
    """Each fused layer whose parts share one grid, by its name in engines, and that grid."""
    for name, kinds in _kinds(grids).items():
        if len(kinds) == 1:
            yield name, next(iter(kinds))


def finding(grids: Mapping[str, Grid]) -> str:
    """One line where parts of a fused layer differ, which those engines do not open; else an empty text."""
    if not (unlike := [next(iter(kinds.values())) for kinds in _kinds(grids).values() if len(kinds) > 1]):
        return ""
    return (
        f"{unlike[0]} is packed otherwise than the layers that vLLM fuses with it ({len(unlike)} such places): "
        "transformers opens the stage, and vLLM does not; give q, k and v one grid, and gate and up"
    )


def _kinds(grids: Mapping[str, Grid]) -> dict[str, dict[Grid, str]]:
    """The grids of each fused layer, each with the first part that has it."""
    found: dict[str, dict[Grid, str]] = {}
    for name, grid in grids.items():
        owner, _, part = name.rpartition(".")
        for fused, parts in FUSED.items():
            if part in parts:
                found.setdefault(f"{owner}.{fused}", {}).setdefault(grid, name)
    return found
