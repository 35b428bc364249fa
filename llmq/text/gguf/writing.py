"""A model folder is written as one GGUF file, tensor by tensor, and the file is read back before it counts.

The file must give every tensor back within the rounding of its type, the tokenizer must cut texts as before, and
transformers' own reader must find a network of the same settings and the same logits.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmq import __version__
from llmq.errors import LlmqError, UserError
from llmq.files import check_space, tagged, write_json
from llmq.guarded import gguf_files
from llmq.guarded.files import library, read_json_object
from llmq.text.formats import KEYS, quantization
from llmq.text.gguf import metadata as gguf_metadata
from llmq.text.gguf import tokenizer as gguf_tokenizer
from llmq.text.gguf import types as gguf_types
from llmq.text.gguf.layout import FILE, HEAD, Architecture, Place, architecture_of, places
from llmq.text.gguf.source import Source
from llmq.text.gguf.types import Type
from llmq.text.tokenizer import copy_tokenizer, load_tokenizer
from llmq.types import JsonObject

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

FILE_TYPES = {"F32": "ALL_F32"}
"""The names of whole files in the package gguf; the others are `MOSTLY_` and the type of most weights."""
WINDOW = {"sliding_window": None, "use_sliding_window": False}


def check(folder: Path) -> None:
    """Raise `UserError` for a network or a tokenizer that is not written as GGUF; needs no weights."""
    from llmq.text.gguf.opening import names_of
    from llmq.text.opening import without_weights

    network = without_weights(folder)
    config = network.config.get_text_config()
    architecture = architecture_of(config, folder)
    gguf_metadata.check(config, architecture)
    places(config, architecture, names_of(network, has_head=False))
    gguf_tokenizer.check_make(load_tokenizer(folder), folder)


def write(folder: Path, target: Path, wanted: str, name: str) -> JsonObject:
    """Write the model in `folder` to `target`/model.gguf, with its configuration and its tokenizer beside the file.

    `wanted` is a type of tensors or AUTO. Returns notes on the types. Raises `UserError` for a network or a tokenizer
    that has no place in the format, `LlmqError` for a file that does not read back as the model.
    """
    source = Source(folder)
    architecture = architecture_of(source.config, folder)
    gguf_metadata.check(source.config, architecture)
    found = {place.name: place for place in places(source.config, architecture, source.names)}
    if architecture.is_tied and HEAD in found:
        raise UserError(
            f"{str(folder)!r}: its output head is not its embeddings, and engines read a {architecture.name} so"
        )
    types = {n: gguf_types.choose(place, source, wanted, gguf_types.is_head(n, found)) for n, place in found.items()}
    tokenizer = load_tokenizer(folder)
    gguf_tokenizer.check_make(tokenizer, folder)
    with library(folder, "model that the package gguf writes"), _quiet():
        _write_file(source, architecture, found, types, tokenizer, target / FILE, name)
    gguf_files.check(target / FILE)
    errors = _read_back(source, found, types, target / FILE)
    if text := gguf_tokenizer.check(target / FILE, tokenizer):
        raise LlmqError(f"the tokenizer of {str(folder)!r} cuts {text!r} otherwise when read from the file")
    window = gguf_metadata.window_left_out(source.config, architecture)
    _write_side_files(folder, target, window)
    return _notes(source, found, types, errors, window, gguf_tokenizer.ends_of(tokenizer, folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of the package gguf, which tells each tensor."""
    logger = logging.getLogger("gguf")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _write_file(
    source: Source,
    architecture: Architecture,
    found: Mapping[str, Place],
    types: Mapping[str, Type],
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    name: str,
) -> None:
    from gguf import GGUFWriter

    rows = source.network.get_input_embeddings().weight.shape[0]
    writer = GGUFWriter(file, architecture.name)
    writer.add_name(name)
    writer.add_quantized_by(f"llmq {__version__}")
    if (license_ := _license(source.folder)) is not None:
        writer.add_license(license_)
    gguf_metadata.describe(writer, source.config, architecture, rows)
    gguf_tokenizer.write(writer, tokenizer, rows, source.folder)
    _add_file_type(writer, source, found, types)
    extra = {n: t.numpy() for n, t in gguf_metadata.rope_tensors(source.config).items()}
    for tensor, array in extra.items():
        writer.add_tensor_info(tensor, array.shape, array.dtype, array.nbytes)
    needed = sum(_announce(writer, source, place, types[n]) for n, place in found.items())
    check_space(file, needed, "the GGUF file")
    # The order of a GGUF file: header, metadata, a description of each tensor, then all data.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in extra.values():
        writer.write_tensor_data(array)
    for tensor, place in found.items():
        writer.write_tensor_data(gguf_types.encoded(place, source, types[tensor]))
    writer.close()


def _license(folder: Path) -> str | None:
    """The licence that the model card of a folder names."""
    from gguf import Metadata

    said = Metadata.load_model_card(folder).get("license")
    return said if isinstance(said, str) else None


def _add_file_type(writer: GGUFWriter, source: Source, found: Mapping[str, Place], types: Mapping[str, Type]) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    most = _weights_by_type(source, found, types).most_common(1)[0][0]
    writer.add_file_type(LlamaFileType[FILE_TYPES.get(most, f"MOSTLY_{most}")])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _weights_by_type(source: Source, found: Mapping[str, Place], types: Mapping[str, Type]) -> Counter[str]:
    """The number of weights of each type in matrices."""
    from math import prod

    counts: Counter[str] = Counter()
    for name, place in found.items():
        shape = gguf_types.shape_of(place, source)
        if len(shape) > 1:
            counts[types[name].name] += prod(shape)
    return counts


def _announce(writer: GGUFWriter, source: Source, place: Place, chosen: Type) -> int:
    """Describe a tensor to the writer, and return its bytes."""
    from math import prod

    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    shape = gguf_types.shape_of(place, source)
    dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(chosen.name, np.uint8))
    kind = GGMLQuantizationType[chosen.name]
    if dtype == np.uint8:
        shape = quant_shape_to_byte_shape(shape, kind)
    size = prod(shape) * dtype.itemsize
    writer.add_tensor_info(place.name, shape, dtype, size, kind)
    return size


def _read_back(source: Source, found: Mapping[str, Place], types: Mapping[str, Type], file: Path) -> dict[str, float]:
    """The largest error of each tensor. Raises `LlmqError` for a tensor that is not what was meant."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    errors = {}
    for tensor in GGUFReader(str(file)).tensors:
        if tensor.name in found:  # the rotary tensors are of no file
            held = dequantize(tensor.data, tensor.tensor_type)
            errors[tensor.name] = gguf_types.check(found[tensor.name], source, types[tensor.name], held)
    if lacking := sorted(found.keys() - errors.keys()):
        raise LlmqError(f"{str(file)!r} was read back without {lacking[0]}")
    return errors


def _write_side_files(folder: Path, target: Path, window: int | None) -> None:
    """Copy tokenizer and settings of generation, and write the configuration of the network that engines compute."""
    copy_tokenizer(folder, target)
    for file in folder.glob("generation_config.json"):
        shutil.copyfile(file, target / file.name)
    config = {k: v for k, v in read_json_object(folder / "config.json").items() if k not in KEYS}
    write_json(target / "config.json", tagged({**config, **(WINDOW if window else {})}))


def _notes(
    source: Source,
    found: Mapping[str, Place],
    types: Mapping[str, Type],
    errors: Mapping[str, float],
    window: int | None,
    ends: Sequence[int],
) -> JsonObject:
    counts = _weights_by_type(source, found, types)
    notes: JsonObject = {"types": dict(counts.most_common())}
    if kept := [name for name, kind in types.items() if kind.kept]:
        notes["grids_kept"] = len(kept)
        notes["largest_distance_to_grid"] = max(types[name].distance for name in kept)
        if source.has_fractional_zeros:
            notes["zero_points"] = "no whole numbers: llama.cpp keeps them, OpenVINO GenAI rounds them to other weights"
    not_kept: Counter[str] = Counter(kind.why_not for kind in types.values() if kind.why_not)
    if not_kept:
        notes["not_kept"] = {why: f"{count} tensors" for why, count in not_kept.items()}
    rounded = {n: e for n, e in errors.items() if not types[n].kept and types[n].name != "F32"}
    if rounded:
        notes["largest_rounding"] = float(f"{max(rounded.values()):.3g}")
    if window:
        notes["window_left_out"] = window
    if beyond := ends[len(gguf_files.ENDS) :]:
        notes["ends_left_out"] = beyond
    if quantization(source.folder) and not kept:
        notes["dequantized"] = True
    return notes
