"""A model's folder before a library opens it: files of weights, their headers, the configuration."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from llmq.errors import UserError
from llmq.guarded import gguf_files
from llmq.guarded.files import (
    check_plain,
    check_plain_folder,
    library,
    parse_json,
    read_json,
    read_json_object,
    unreadable,
)
from llmq.types import JsonObject

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a model in one file, or the list of the files that hold them."""
FILE_BYTES = "file_bytes"
FILE_TYPES = "file_types"
"""The notes of a base that is a GGUF file: its bytes and its types, where the weights opened are made from it."""
OTHER_NAME = "transformers_weights"
"""The key of `config.json` under which a folder names another file or index than those two."""
LONGEST = 100_000_000
"""The most bytes of a header, which is the limit of safetensors itself."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of a number of each dtype that safetensors 0.8 knows."""
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PACKED = {
    "U8": "uint8",
    "I8": "int8",
    "U4": "uint4",
    "I4": "int4",
    "I32": "int32",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
}
"""safetensors' names of dtypes; OpenVINO's are the same in lower case. `FLOATS` are weights as they stand; all others
(integers, complex, floats of 8 bits and fewer) are none without scales beside them."""
GRAPHS = ("model.xml", "openvino_model.xml")
"""The names of OpenVINO's graph of an image model, and of a language model."""
CONSTANT = re.compile(r'type="Const"[^>]*>\s*<data element_type="(\w+)"[^>]*?\bshape="([\d, ]*)"[^>]*\bsize="(\d+)"')
"""A constant of an OpenVINO graph: its dtype, shape and bytes."""
CODES = {"u4": 4, "u8": 8}
"""Bits of the codes of packed layers in a graph, (outputs, groups, inputs of a group)."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
SHARED = 200
"""Layers that a network may have with fewer tensors in the files: a few families use one block again and again."""
WIDEST = 2**26
"""The largest count in a configuration: vocabularies have up to 2^19 tokens, positions up to 2^24."""
COUNTS = ("size", "dim", "heads", "experts", "layers", "layer", "head", "embd", "inner", "positions", "groups", "rank")
"""Endings of the names of such counts."""


class Entry(NamedTuple):
    """A tensor by the header of its file; it lies from `begin` to `end` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_folder(place: Path) -> None:
    """Raise `UserError` for pipes, broken headers and configurations, absurd sizes, and an adapter among weights."""
    if not place.is_dir():
        return
    check_plain_folder(place)
    for file in safetensors_of(place):
        header(file)
    if (place / "config.json").exists():
        read_configuration(place)
        check_no_adapter(place)
    if (place / "adapter_config.json").exists():
        read_json_object(place / "adapter_config.json")


def check_no_adapter(place: Path) -> None:
    """Raise `UserError` for an adapter beside a model: transformers would open the sum of both."""
    if (place / "adapter_config.json").exists():
        raise UserError(
            f"{str(place)!r} holds a model and an adapter (adapter_config.json), which transformers would open as the "
            "sum of both; put the adapter into a folder of its own"
        )


@contextmanager
def opened(file: Path, framework: str = "pt") -> Iterator[Any]:
    """Check the header of a safetensors file, and open the file."""
    from safetensors import safe_open

    header(file)
    with library(file, "safetensors file"), safe_open(file, framework) as tensors:
        yield tensors


def header(file: Path) -> dict[str, Entry]:
    """The entries of all tensors of a file, by name. Raises `UserError` for a file that is not whole."""
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
        told = parse_json(text.decode(), str(file))
    except (UserError, UnicodeDecodeError):
        raise _broken(file, "its header is not JSON") from None
    if not isinstance(told, dict):
        raise _broken(file, "its header is no JSON object")
    entries = {name: _entry(file, name, about) for name, about in told.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise _broken(file, f"{name[:80]!r} begins at byte {entry.begin}, and the tensor before it ends at {end}")
        end = entry.end
    if 8 + length + end != size:
        raise _broken(file, f"its header promises {8 + length + end} bytes, and it has {size}")
    return entries


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


def entry_of(folder: Path) -> Path | None:
    """The file where transformers begins: the one that `config.json` names, the single file, or the index; or None.

    Raises `UserError` for a `transformers_weights` that transformers does not take, or that is not there.
    """
    config = folder / "config.json"
    name = read_json_object(config).get(OTHER_NAME) if config.is_file() else None
    if name is None:
        return next((folder / known for known in (SINGLE, INDEX) if (folder / known).exists()), None)
    where = f"{str(config)!r}: {OTHER_NAME} {name!r}"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{where} is no *.safetensors and no *.safetensors.index.json")
    if not Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder)):
        raise UserError(f"{where} lies outside the folder; name a file in it")
    if not (folder / name).is_file():
        raise UserError(f"{where} is not there; take the key away, and {SINGLE} or {INDEX} is opened")
    return folder / name


def safetensors_of(folder: Path) -> list[Path]:
    """The files of a model's weights that transformers opens (`entry_of`), or all where it would open none.

    A repository may hold the same weights twice, as `consolidated.safetensors` too; only opened files count.
    """
    entry = entry_of(folder)
    if entry is None:
        return sorted(folder.glob("*.safetensors"))
    if entry.suffix == ".safetensors":
        return [entry]
    try:
        shards = sorted(set(read_json(entry)["weight_map"].values()))
        files = [folder / name for name in shards]
    except (UserError, TypeError, KeyError, AttributeError):
        raise UserError(f"{str(entry)!r} is no index of weights; copy it again, or remove it") from None
    if odd := [name for name in shards if Path(name).name != name]:
        raise UserError(f"{str(entry)!r} names {odd[0]!r}; the files of weights lie beside it")
    return files or sorted(folder.glob("*.safetensors"))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: a graph (ONNX, or OpenVINO with constants), safetensors, or else GGUF."""
    graph = next((folder / name for name in GRAPHS if (folder / name).exists()), None)
    whole, gguf = (folder / name for name in ("model.onnx", "model.gguf"))
    if whole.exists():
        return [whole]
    if graph:
        return [graph, graph.with_suffix(".bin")]
    return safetensors_of(folder) or ([gguf] if gguf.exists() else [])


def stored_as(files: Iterable[Path]) -> str:
    """The dtype of most stored weights in files or a graph; for packed weights also that of the others.

    Such as `float32`, `uint8 and bfloat16`. Packed layers and codes of a graph tell their grids, GGUF files mix
    types, and all are told, that of most bytes first: `4 bits in groups of 64 and bfloat16`, `Q4_K, Q6_K and float32`.
    Whether a grid is symmetric is not told: the bytes are the same. Empty where no file tells.
    """
    sizes: Counter[str] = Counter()
    mixed = False
    for file in files:
        if file.suffix == ".xml" and file.is_file():
            sizes.update(_of_graph(file))
        if file.suffix == ".onnx" and file.is_file():
            for dtype, size in _of_onnx(file):
                sizes[dtype] += size
        if file.suffix == ".safetensors" and file.is_file():
            sizes.update(_of_safetensors(file))
        if file.suffix == ".gguf" and file.is_file():
            mixed = True
            sizes.update(gguf_files.stored(file))
    dtypes = [dtype for dtype, _ in sizes.most_common()]
    grids = [kind for kind in dtypes if " bits" in kind]
    packed = grids or [PACKED.get(dtype, dtype) for dtype in dtypes if dtype not in FLOATS]
    told = packed if mixed or grids else packed[:1] if dtypes and dtypes[0] not in FLOATS else []
    return " and ".join(([", ".join(told)] if told else []) + [FLOATS[d] for d in dtypes if d in FLOATS][:1])


def _of_graph(file: Path) -> Counter[str]:
    """The bytes of all constants of a graph of OpenVINO by dtype; those of codes by their grid."""
    constants = [
        (dtype, [int(n) for n in shape.split(",") if n.strip()], int(size))
        for dtype, shape, size in CONSTANT.findall(file.read_text(encoding="utf-8"))
    ]
    sizes: Counter[str] = Counter()
    for dtype, shape, size in constants:
        is_code = file.name == GRAPHS[1] and dtype in CODES and len(shape) == 3 and shape[2] > 1
        sizes[_grid(CODES[dtype], shape[2]) if is_code else dtype.upper()] += size
    return sizes


def _of_safetensors(file: Path) -> Counter[str]:
    """The bytes of all tensors of a file by dtype; those of packed layers (GPTQ, pack-quantized) by their grid."""
    tensors = header(file)
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    for beginning, names, words, inputs, groups in _packed_layers(file, tensors):
        grid = _grid(words * 32 // max(inputs, 1), -(-inputs // max(groups, 1)))
        kinds |= {name: grid for part in names if (name := beginning + part) in tensors}
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        sizes[kinds[name]] += tensor.end - tensor.begin
    return sizes


GPTQ_PARTS = ("qweight", "g_idx", "scales", "qzeros")
TURNED_PARTS = ("packed", "scale", "shape", "zero_point", "g_idx")
"""What the tensors of a layer are called after `weight_` in the pack-quantized format."""


def _packed_layers(file: Path, tensors: dict[str, Entry]) -> Iterator[tuple[str, tuple[str, ...], int, int, int]]:
    """Of each packed layer: how its tensors' names begin, and end; words of codes an output, inputs, groups."""
    told = [name for name, tensor in tensors.items() if name.endswith("weight_shape") and tensor.shape == (2,)]
    inputs: dict[str, int] = {}
    if told:
        with opened(file, "np") as held:
            inputs = {name: int(held.get_tensor(name)[1]) for name in told}
    for name, codes in tensors.items():
        beginning = name.removesuffix("qweight")
        order, scales = (tensors.get(beginning + part) for part in GPTQ_PARTS[1:3])
        if beginning != name and order and scales and all((codes.shape, order.shape, scales.shape)):
            yield beginning, GPTQ_PARTS, codes.shape[0], order.shape[0], scales.shape[0]
        beginning = name.removesuffix("packed")
        scales = tensors.get(f"{beginning}scale")
        if beginning != name and scales and f"{beginning}shape" in inputs and len(codes.shape + scales.shape) == 4:
            yield beginning, TURNED_PARTS, codes.shape[1], inputs[beginning + "shape"], scales.shape[1]


def _grid(bits: int, group: int) -> str:
    return f"{bits} bits in groups of {group}"


def _of_onnx(file: Path) -> Iterator[tuple[str, int]]:
    """The dtype, by safetensors' names, and the bytes of each constant of an ONNX file."""
    with library(file, "ONNX file"):
        import onnx

        names = {"FLOAT": "F32", "FLOAT16": "F16", "DOUBLE": "F64", "INT8": "I8", "UINT8": "U8"}
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            if kind in names:  # others are shapes and indices
                yield names[kind], prod(tensor.dims) * BITS[names[kind]] // 8


def read_configuration(folder: Path) -> JsonObject:
    """The `config.json` of a folder. Raises `UserError` for more layers than its files can hold, or absurd sizes."""
    file = folder / "config.json"
    data = read_json_object(file)
    numbers = list(_numbers(data))
    for name, value in numbers:
        if name.rpartition("_")[2] in COUNTS and abs(value) > WIDEST:
            raise UserError(f"{str(file)!r}: {name} is {_short(value)}, and no network is so large ({WIDEST} at most)")
    layers = [(value, name) for name, value in numbers if name in LAYERS and value > SHARED]
    if layers:
        value, name = max(layers)
        tensors = sum(len(header(part)) for part in safetensors_of(folder))
        if value > tensors:
            raise UserError(f"{str(file)!r}: {name} is {_short(value)}, and the files beside it hold {tensors} tensors")
    return data


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) <= 30 else f"a number of {len(text)} digits"


def _numbers(data: object) -> Iterator[tuple[str, float]]:
    """Every number of nested data with its key."""
    for name, value in data.items() if isinstance(data, dict) else ():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield str(name), value
        else:
            yield from _numbers(value)
