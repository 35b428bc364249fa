"""Checks of the tensors of packed layers, against one another and the layer, before native code reads them.

Formats: AutoGPTQ's, and bitsandbytes' `QuantState`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """The header entry of a tensor in a safetensors file; `dtype` is the name that safetensors gives."""

    dtype: str
    shape: Shape
    file: Path


Held = Mapping[str, Stored]
"""Stored tensors by name."""

GPTQ = ("qweight", "scales", "qzeros", "g_idx")
PACK = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
STATE = "weight.quant_state.bitsandbytes__"
FLOATS = ("F16", "BF16", "F32")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The numbers of weights that can share a scale in bitsandbytes."""
DTYPES = ("float16", "bfloat16", "float32")


def faults_of_parts(held: Held, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """The packed layers with a part that is missing, or that does not fit the other parts or the layer.

    `shapes` has the `(outputs, inputs)` of each layer of the network, by the name of the layer in the files.
    """
    # By qweight or qzeros: a layer that lacks one of them is found by the other.
    for layer in sorted({name.rpartition(".")[0] for name in held if name.rpartition(".")[2] in GPTQ[:3:2]}):
        yield from _gptq(layer, {p: held.get(f"{layer}.{p}") for p in GPTQ}, shapes.get(layer))
    for layer in sorted({n.rpartition(".")[0] for n in held if n.endswith((".weight_packed", ".weight_shape"))}):
        yield from _pack_quantized(layer, {p: held[f"{layer}.{p}"] for p in PACK if f"{layer}.{p}" in held}, shapes)
    # bitsandbytes: parts below the weight (4 bits), SCB beside it (8 bits), or a lone weight of bytes.
    packed = {n.partition(".weight.")[0] for n in held if ".weight." in n}
    packed |= {n.removesuffix(".SCB") for n in held if n.endswith(".SCB")}
    packed |= {
        n.removesuffix(".weight")
        for n, tensor in held.items()
        if n.endswith(".weight") and tensor.dtype in ("U8", "I8")
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
    # q (inputs * bits / 32, outputs), scales (groups, outputs), zeros (groups, outputs * bits / 32)
    (words, q), (kind, scales), (zero_words, zeros) = ((parts[name] or ("", ()))[:2] for name in GPTQ[:3])
    order = parts["g_idx"]
    if (words, zero_words) != ("I32", "I32") or kind not in FLOATS or (order and order[0] not in ("I32", "I64")):
        yield f"{layer} has parts of other dtypes: qweight {words}, scales {kind}, qzeros {zero_words}"
    elif not len(q) == len(scales) == len(zeros) == 2 or zeros[1] == 0:
        yield f"{layer} has parts of other shapes: qweight {list(q)}, scales {list(scales)}, qzeros {list(zeros)}"
    else:
        outputs, groups = scales[1], scales[0]
        inputs = shape[1] if shape else order[1][0] if order else 0  # g_idx (inputs,)
        fits = q[1] == outputs and zeros[0] == groups and (not shape or shape[0] == outputs)
        # A division that is not whole gives bits that no format has.
        bits = q[0] * 32 / inputs if inputs else zeros[1] * 32 / outputs
        fits = fits and bits in (2, 3, 4, 8) and zeros[1] * 32 == outputs * bits
        if not fits or (order and order[1] != (inputs,)):
            told = f"qweight {list(q)}, scales {list(scales)}, qzeros {list(zeros)}"
            yield f"{layer} has parts that do not fit{f' {list(shape)}' if shape else ''}: {told}"


def _pack_quantized(layer: str, parts: Held, shapes: Mapping[str, Shape]) -> Iterator[str]:
    if lacking := [name for name in PACK[:3] if name not in parts]:
        yield f"{layer} lacks {lacking[0]}"
        return
    words, scales, zeros = parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point")
    order, shape = parts.get("weight_g_idx"), shapes.get(layer) or _numbers(parts["weight_shape"], layer)
    # words (outputs, inputs * bits / 32), scales (outputs, groups), zeros (outputs * bits / 32, groups)
    dtypes = words.dtype == "I32" and scales.dtype in FLOATS and (zeros is None or zeros.dtype == "I32")
    fits = dtypes and len(shape) == len(words.shape) == len(scales.shape) == 2 and min(*shape, *scales.shape) > 0
    if fits:
        bits, groups = words.shape[1] * 32 / shape[1], scales.shape[1]
        fits = words.shape[0] == scales.shape[0] == shape[0] and bits in (2, 3, 4, 8) and shape[1] % groups == 0
        fits = fits and (zeros is None or zeros.shape == (-(-shape[0] * int(bits) // 32), groups))
        fits = fits and (order is None or (order.shape == (shape[1],) and order.dtype in ("I32", "I64")))
        fits = fits and _numbers(parts["weight_shape"], layer) == shape
    if not fits:
        told = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in parts.items())
        yield f"{layer} has parts that do not fit {list(shape)}: {told}"


def _numbers(held: Stored, layer: str) -> Shape:
    """The outputs and inputs that `weight_shape` tells; nothing where it tells other than two whole numbers."""
    from safetensors import safe_open

    if held.dtype not in ("I64", "I32") or held.shape != (2,):
        return ()
    with safe_open(held.file, "pt") as opened:
        return tuple(opened.get_tensor(f"{layer}.weight_shape").tolist())


def _int8(layer: str, parts: Held, shape: Shape | None) -> Iterator[str]:
    if lacking := [name for name in ("weight", "SCB") if name not in parts]:
        yield f"{layer} lacks {lacking[0]}"
        return
    (dtype, held, _), (kind, scales, _) = parts["weight"], parts["SCB"]
    # weight (outputs, inputs), SCB (outputs,)
    if dtype != "I8" or kind != "F32" or len(held) != 2 or scales != held[:1] or (shape and held != shape):
        yield f"{layer} has parts that do not fit: weight {dtype} {list(held)}, SCB {kind} {list(scales)}"


def _four_bits(layer: str, parts: Held, shape: Shape | None) -> Iterator[str]:
    state = next((name for name in parts if name.startswith(STATE)), f"{STATE}nf4")
    nested = "weight.nested_absmax" in parts or "weight.nested_quant_map" in parts
    needed = ["weight", "weight.absmax", "weight.quant_map", state]
    # Double quantization: the scales are quantized in their turn.
    needed += ["weight.nested_absmax", "weight.nested_quant_map"] if nested else []
    if lacking := [name for name in needed if name not in parts]:
        yield f"{layer} lacks {lacking[0]}"
        return
    if more := [name for name in parts if name not in needed]:
        yield f"{layer} has {more[0]}, which is no part of a packed layer"
        return
    described, block, inner_block = _sizes(parts[state].file, f"{layer}.{state}")
    # Numbers of which one is negative may stand for sizes that fit.
    if not described or min(described) < 1 or block < 1 or inner_block < 0 or (shape and described != shape):
        yield f"{layer} describes {list(described)}, needed {list(shape or ())}"
        return
    count = prod(described)
    blocks = -(-count // block)  # the last block may be short
    # Two weights share a byte; four bits index 16 values.
    sizes = {"weight": -(-count // 2), "weight.absmax": blocks, "weight.quant_map": 16}
    dtypes = {"weight": "U8", "weight.absmax": "U8" if nested else "F32", "weight.quant_map": "F32"}
    if nested:
        inner = inner_block or blocks  # no nested block: one for all
        sizes |= {"weight.nested_absmax": -(-blocks // inner), "weight.nested_quant_map": 256}
        dtypes |= {"weight.nested_absmax": "F32", "weight.nested_quant_map": "F32"}
    for name, size in sizes.items():
        dtype, dims, _ = parts[name]
        wrong_turn = name == "weight" and dims != (size, 1)  # (bytes, 1)
        if prod(dims) != size or dtype != dtypes[name] or wrong_turn:
            yield f"{layer}.{name} is {dtype} {list(dims)}, needed {dtypes[name]} of {size}"


def _sizes(file: Path, name: str) -> tuple[Shape, int, int]:
    """Shape, block and nested block of a 4-bit layer, from the JSON in a tensor of bytes; zeros for other bytes."""
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        text = bytes(opened.get_tensor(name).tobytes())
    try:
        state = json.loads(text)
        shape = tuple(int(n) for n in state["shape"])
        return shape, int(state["blocksize"]), int(state.get("nested_blocksize") or 0)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return (), 0, 0


def faults_of_values(held: Held) -> Iterator[str]:
    """The values that native code or an index must not trust, in packed layers without `faults_of_parts`."""
    for name, value in _trusted(held):
        if STATE in name:
            yield from (f"{name} says {fault}" for fault in _faults_of_state(value, name.rpartition("__")[2]))
        elif name.endswith("quant_map"):
            yield from _unless((value.abs() <= 1).all(), f"{name} holds values outside of -1 to 1")
        elif name.endswith(("absmax", ".SCB")):
            good = (value.isfinite() & (value >= 0)).all()
            yield from _unless(good, f"{name} holds values that are no scales: negative, or not finite")
        elif name.endswith((".scales", ".weight_scale")):
            yield from _unless(value.isfinite().all(), f"{name} holds values that are not finite")
        elif name.endswith((".g_idx", ".weight_g_idx")):
            layer, by_index = name.rpartition(".")[0], name.endswith(".g_idx")
            groups = held[f"{layer}.scales"].shape[0] if by_index else held[f"{layer}.weight_scale"].shape[1]
            good = ((value >= 0) & (value < groups)).all()
            yield from _unless(good, f"{name} names groups outside of 0 to {groups - 1}")


def _unless(good: Tensor, fault: str) -> Iterator[str]:
    if not bool(good):
        yield fault


def _trusted(held: Held) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose values native code trusts, file by file."""
    from safetensors import safe_open

    endings = (".weight.quant_map", ".weight.nested_quant_map", ".weight.absmax", ".weight.nested_absmax", ".SCB")
    by_file: dict[Path, list[str]] = {}
    for name, tensor in held.items():
        layer = name.rpartition(".")[0]
        packed = f"{layer}.qweight" in held and name.endswith((".scales", ".g_idx"))
        packed |= f"{layer}.weight_packed" in held and name.endswith((".weight_scale", ".weight_g_idx"))
        # Nested scales are U8 codes, of which any will do.
        if packed or STATE in name or (name.endswith(endings) and tensor.dtype != "U8"):
            by_file.setdefault(tensor.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, "pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in names)


def _faults_of_state(value: Tensor, kind: str) -> Iterator[str]:
    """The wrong entries in the description of a 4-bit layer, which bitsandbytes would believe."""
    state: Mapping[str, object] = json.loads(bytes(value.numpy().tobytes()))
    checks: dict[str, Callable[[object], bool]] = {
        "quant_type": lambda v: v == kind and kind in ("nf4", "fp4"),
        "blocksize": lambda v: _is_in(v, BLOCKS),
        "dtype": lambda v: _is_in(v, DTYPES),
        "shape": lambda v: isinstance(v, list) and all(type(n) is int and n > 0 for n in v),  # bool is an int too
    }
    if "nested_blocksize" in state:
        checks |= {
            "nested_blocksize": lambda v: _is_in(v, BLOCKS),
            "nested_dtype": lambda v: v == "float32",
            "nested_offset": lambda v: isinstance(v, int | float) and type(v) is not bool and abs(v) < 1e30,
        }
    for key, is_right in checks.items():
        if not is_right(state.get(key)):
            yield f"{key}: {state.get(key)!r:.60}"


def _is_in(value: object, known: tuple[object, ...]) -> bool:
    return type(value) is type(known[0]) and value in known
