"""The values of packed layers that native code or an index trusts: looked at before either sees them."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmq.models.packed_parts import STATE, Held

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""How many weights can share a scale in bitsandbytes."""
DTYPES = ("float16", "bfloat16", "float32")


def faults(held: Held) -> Iterator[str]:
    """What is amiss with the values of packed layers whose parts are there and of the right shape and dtype."""
    for name, value in _read(held):
        if STATE in name:
            yield from (f"{name} says {told}" for told in _of_state(value, name.rpartition("__")[2]))
        elif name.endswith("quant_map"):
            yield from _unless(bool((value.abs() <= 1).all()), f"{name} holds values outside of -1 to 1")
        elif name.endswith(("absmax", ".SCB")):
            good = bool((value.isfinite() & (value >= 0)).all())
            yield from _unless(good, f"{name} holds values that are no scales: negative, or not finite")
        elif name.endswith(".scales"):
            yield from _unless(bool(value.isfinite().all()), f"{name} holds values that are not finite")
        elif name.endswith(".g_idx"):
            groups = held[f"{name.removesuffix('.g_idx')}.scales"].shape[0]
            good = bool(((value >= 0) & (value < groups)).all())
            yield from _unless(good, f"{name} names groups outside of 0 to {groups - 1}")


def _unless(good: bool, fault: str) -> Iterator[str]:
    if not good:
        yield fault


def _read(held: Held) -> Iterator[tuple[str, Any]]:
    """The tensors to be looked at, file by file."""
    from safetensors import safe_open

    endings = (".weight.quant_map", ".weight.nested_quant_map", ".weight.absmax", ".weight.nested_absmax", ".SCB")
    looked_at: dict[Path, list[str]] = {}
    for name, its in held.items():
        packed = f"{name.rpartition('.')[0]}.qweight" in held and name.endswith((".scales", ".g_idx"))
        if packed or STATE in name or (name.endswith(endings) and its.dtype != "U8"):
            looked_at.setdefault(its.file, []).append(name)
    for file, names in looked_at.items():
        with safe_open(file, "pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in names)


def _of_state(value: Any, kind: str) -> Iterator[str]:
    """What bitsandbytes would believe of a 4-bit layer's own description, and should not."""
    said: Mapping[str, Any] = json.loads(bytes(value.numpy().tobytes()))
    is_nested = "nested_blocksize" in said
    checks: dict[str, Callable[[Any], bool]] = {
        "quant_type": lambda v: v == kind and kind in ("nf4", "fp4"),
        "blocksize": lambda v: _is_in(v, BLOCKS),
        "dtype": lambda v: _is_in(v, DTYPES),
        "shape": lambda v: isinstance(v, list) and all(type(n) is int and n > 0 for n in v),
    }
    if is_nested:
        checks |= {
            "nested_blocksize": lambda v: _is_in(v, BLOCKS),
            "nested_dtype": lambda v: v == "float32",
            "nested_offset": lambda v: type(v) in (int, float) and abs(v) < 1e30,
        }
    for key, is_right in checks.items():
        if not is_right(said.get(key)):
            yield f"{key}: {said.get(key)!r:.60}"


def _is_in(value: Any, known: tuple[Any, ...]) -> bool:
    return type(value) is type(known[0]) and value in known
