"""The tensors that one packed layer is made of, compared with one another and with the layer before they are opened."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """What the head of a safetensors file says of a tensor, the dtype by safetensors' name for it."""

    dtype: str
    shape: Shape
    file: Path


Held = Mapping[str, Stored]
"""Stored tensors by name."""

GPTQ = ("qweight", "scales", "qzeros", "g_idx")
STATE = "weight.quant_state.bitsandbytes__"
FLOATS = ("F16", "BF16", "F32")


def faults(held: Held, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """What is amiss with packed layers: parts that are not there, or do not fit each other or the layer.

    `shapes` says the `(outputs, inputs)` of the layers that the network names alike.
    Formats: AutoGPTQ's, and bitsandbytes' `QuantState`.
    """
    for layer in sorted({name.rpartition(".")[0] for name in held if name.rpartition(".")[2] in GPTQ[:3:2]}):
        yield from _gptq(layer, {p: held.get(f"{layer}.{p}") for p in GPTQ}, shapes.get(layer))
    packed = {n.partition(".weight.")[0] for n in held if ".weight." in n}
    packed |= {n.removesuffix(".SCB") for n in held if n.endswith(".SCB")}
    packed |= {
        n.removesuffix(".weight") for n, its in held.items() if n.endswith(".weight") and its.dtype in ("U8", "I8")
    }
    for layer in sorted(packed):
        parts = {
            n.removeprefix(f"{layer}."): v for n, v in held.items() if n.startswith((f"{layer}.weight", f"{layer}.SCB"))
        }
        is_int8 = "SCB" in parts or ("weight" in parts and parts["weight"].dtype == "I8")
        yield from (_int8 if is_int8 else _four_bits)(layer, parts, shapes.get(layer))


def _gptq(layer: str, parts: Mapping[str, Stored | None], shape: Shape | None) -> Iterator[str]:
    lacking = [name for name in GPTQ[:3] if parts[name] is None]
    if lacking:
        yield f"{layer} lacks {lacking[0]}"
        return
    (words, q), (kind, scales), (zero_words, zeros) = ((parts[name] or ("", ()))[:2] for name in GPTQ[:3])
    order = parts["g_idx"]
    if (words, zero_words) != ("I32", "I32") or kind not in FLOATS or (order and order[0] not in ("I32", "I64")):
        yield f"{layer} has parts of other dtypes: qweight {words}, scales {kind}, qzeros {zero_words}"
    elif not len(q) == len(scales) == len(zeros) == 2 or zeros[1] == 0:
        yield f"{layer} has parts of other shapes: qweight {list(q)}, scales {list(scales)}, qzeros {list(zeros)}"
    else:
        outputs, groups = scales[1], scales[0]
        inputs = shape[1] if shape else order[1][0] if order else 0
        fits = q[1] == outputs and zeros[0] == groups and (not shape or shape[0] == outputs)
        bits = q[0] * 32 / inputs if inputs else zeros[1] * 32 / outputs
        fits = fits and bits in (2, 3, 4, 8) and zeros[1] * 32 == outputs * bits
        if not fits or (order and order[1] != (inputs,)):
            told = f"qweight {list(q)}, scales {list(scales)}, qzeros {list(zeros)}"
            yield f"{layer} has parts that do not fit{f' {list(shape)}' if shape else ''}: {told}"


def _int8(layer: str, parts: Held, shape: Shape | None) -> Iterator[str]:
    if lacking := [name for name in ("weight", "SCB") if name not in parts]:
        yield f"{layer} lacks {lacking[0]}"
        return
    (dtype, found, _), (kind, scales, _) = parts["weight"], parts["SCB"]
    if dtype != "I8" or kind != "F32" or len(found) != 2 or scales != found[:1] or (shape and found != shape):
        yield f"{layer} has parts that do not fit: weight {dtype} {list(found)}, SCB {kind} {list(scales)}"


def _four_bits(layer: str, parts: Held, shape: Shape | None) -> Iterator[str]:
    state = next((name for name in parts if name.startswith(STATE)), f"{STATE}nf4")
    needed = ["weight", "weight.absmax", "weight.quant_map", state]
    nested = [n for n in ("weight.nested_absmax", "weight.nested_quant_map") if n in parts]
    needed += ["weight.nested_absmax", "weight.nested_quant_map"] if nested else []
    if lacking := [name for name in needed if name not in parts]:
        yield f"{layer} lacks {lacking[0]}"
        return
    more = [name for name in parts if name not in needed]
    if more:
        yield f"{layer} has {more[0]}, which is no part of a packed layer"
        return
    described = _state(parts[state].file, f"{layer}.{state}")
    found, block, inner_block = described.shape, described.blocksize, described.nested_blocksize
    count = prod(found)
    # Numbers of which one is negative may stand for sizes that fit.
    if not found or min(found) < 1 or block < 1 or inner_block < 0 or (shape and found != shape):
        yield f"{layer} describes {list(found)}, needed {list(shape or ())}"
        return
    blocks = -(-count // block)
    sizes = {"weight": -(-count // 2), "weight.absmax": blocks, "weight.quant_map": 16}
    dtypes = {"weight": "U8", "weight.absmax": "U8" if nested else "F32", "weight.quant_map": "F32"}
    if nested:
        inner = inner_block or blocks
        sizes |= {"weight.nested_absmax": -(-blocks // inner), "weight.nested_quant_map": 256}
        dtypes |= {"weight.nested_absmax": "F32", "weight.nested_quant_map": "F32"}
    for name, size in sizes.items():
        dtype, dims, _ = parts[name]
        wrong_turn = name == "weight" and dims != (size, 1)  # (bytes, 1)
        if prod(dims) != size or dtype != dtypes[name] or wrong_turn:
            yield f"{layer}.{name} is {dtype} {list(dims)}, needed {dtypes[name]} of {size}"


@dataclass(frozen=True)
class _State:
    """What a 4-bit layer says of itself."""

    shape: Shape = ()
    blocksize: int = 0
    nested_blocksize: int = 0


def _state(file: Path, name: str) -> _State:
    """JSON in a tensor of bytes; empty where it is none."""
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        text = bytes(opened.get_tensor(name).tobytes())
    try:
        said = json.loads(text)
        shape = tuple(int(n) for n in said["shape"])
        return _State(shape, int(said["blocksize"]), int(said.get("nested_blocksize") or 0))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _State()
