"""A GGUF file as it is in OpenVINO: GenAI's own reader makes a graph of its codes, which a cache keeps.

The reader keeps the zero points of asymmetric blocks in 4 bits: rounded to whole numbers, and modulo 16. Weights of
most foreign files of such types are then others than in the file: perplexity 34.98 instead of 28.25 for the Q4_1 file
of SmolLM2-135M.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmq.errors import UserError
from llmq.files import at_home, cache, check_space, make_whole, sha256_files, write_json
from llmq.guarded import gguf_files
from llmq.guarded.files import library, read_json_object
from llmq.guarded.weights import FILE_BYTES, FILE_TYPES, stored_as
from llmq.openvino_runtime import EXACT, LANGUAGE_GRAPH, core, openvino, quietly, write_graph
from llmq.text.gguf.metadata import restore, rope_of
from llmq.text.weights import BUILT_IN, built_in, parts_of

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import PretrainedConfig

READ = ("llama", "qwen2", "qwen3")
"""The architectures that GenAI's reader knows."""
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""The types of matrices that the reader knows; of others it tells no name."""
PLAIN = ("F32", "F16")
"""The first two of GGUF's names of whole files: of a file that bears one of them the reader expects floats alone."""
CONVERSION = 4
"""The version of the conversion; the cache keeps the files of each version apart."""
ROUNDED = 1e-3
"""The share of the weights' norm by which rounded zero points may move them, unsaid."""
CURE = "leave runtime out to open it in torch"
LOOKED_AT = 2**16
"""Blocks of a tensor whose zero points are looked at."""


def bring(weights: str) -> tuple[Path, dict[str, str | int]]:
    """The folder that OpenVINO runs for a GGUF file, a built-in word or a folder with a graph, and notes on it."""
    path = built_in(weights) if weights in BUILT_IN else at_home(weights)
    if path.is_dir():
        return path.resolve(), {"source": weights}
    return from_gguf(path)


def from_gguf(file: Path) -> tuple[Path, dict[str, str | int]]:
    """A folder in the cache with the graph of a GGUF file, and notes, with a finding where its weights are others."""
    if len(parts_of(file)) > 1:
        raise UserError(f"{str(file)!r} is one part of several, which OpenVINO GenAI does not read; join them first")
    gguf_files.check(file)
    digest = sha256_files([file])
    size = file.stat().st_size
    kept = cache("models", f"{file.stem}-openvino-{digest[:16]}-{CONVERSION}")
    if not kept.exists():
        check_space(kept, 2 * size, f"the graph of {file.name}")
    with library(file, "GGUF model"):
        folder = make_whole(kept, lambda partial: _convert(file.resolve(), partial), shared=True)
    about = read_json_object(folder / "gguf.json")
    notes: dict[str, str | int] = {
        "source": f"GGUF file {file.name}, stored as {stored_as([file])}, as OpenVINO GenAI reads it",
        "sha256": digest,
        FILE_BYTES: size,
        FILE_TYPES: stored_as([file]),
    }
    return folder, {**notes, **({"finding": str(about["finding"])} if about.get("finding") else {})}


def _convert(file: Path, folder: Path) -> None:
    """Write the graph, the tokenizers, and the files of transformers."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    openvino()  # first: it keeps the libraries from reporting home
    import openvino_genai

    reader = GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in READ:
        raise UserError(
            f"{str(file)!r} is a {architecture!r}, and OpenVINO GenAI reads GGUF files of {', '.join(READ)}; {CURE}"
        )
    _check_types(file, reader)
    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    _check_positions(file, config)
    link = folder / file.name
    link.symlink_to(file)  # the reader writes beside the file that it is given
    with quietly():
        openvino_genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
    _with_exact_options(folder / LANGUAGE_GRAPH)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=gguf_files.ends(file) or None).save_pretrained(
        folder
    )
    link.unlink()
    write_json(folder / "gguf.json", {"file": file.name, "finding": rounded_zeros(reader)})


def _check_types(file: Path, reader: GGUFReader) -> None:
    """Raise `UserError` for types of tensors that the reader of GenAI does not know, or does not look for."""
    held = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    if unknown := {kind: count for kind, count in held.items() if kind not in TYPES}:
        told = " and ".join(f"{count} matrices of {kind}" for kind, count in unknown.items())
        raise UserError(f"{str(file)!r} has {told}, and OpenVINO GenAI reads {', '.join(TYPES)}; {CURE}")
    said = reader.fields.get("general.file_type")
    packed = sorted(held.keys() - {"F16"})
    if packed and (said is None or said.contents() in range(len(PLAIN))):
        name = "nothing" if said is None else PLAIN[said.contents()]
        raise UserError(
            f"{str(file)!r} has tensors of {', '.join(packed)} and its general.file_type says {name}, which OpenVINO "
            f"GenAI goes by; {CURE}"
        )


def _check_positions(file: Path, config: PretrainedConfig) -> None:
    """Raise `UserError` for a file with scaled rotary positions, whose scaling the reader of GenAI leaves out."""
    plain = config.to_dict()
    restore(file, config)
    if config.to_dict() != plain:
        kind = rope_of(config).get("rope_type", "default")
        raise UserError(
            f"{str(file)!r} scales its rotary positions ({kind}), which OpenVINO GenAI leaves out: it would answer "
            f"otherwise; {CURE}"
        )


def _with_exact_options(file: Path) -> None:
    graph = core().read_model(file)
    for name, value in EXACT.items():
        graph.set_rt_info(value, ["runtime_options", name])
    whole = file.with_name("whole.xml")
    write_graph(graph, whole)
    del graph  # it maps the file that is replaced
    for end in (".bin", ".xml"):
        whole.with_suffix(end).replace(file.with_suffix(end))


def rounded_zeros(reader: GGUFReader) -> str:
    """What the rounding of zero points does to the weights of a file, in words; empty where all are whole."""
    moved = norm = 0.0
    names = []
    for tensor in reader.tensors:
        part = [*_moved(tensor)]
        if part and part[0] > ROUNDED**2 * part[1]:
            names.append(tensor.name)
        if part:
            moved, norm = moved + part[0], norm + part[1]
    if not names:
        return ""
    kinds = sorted({t.tensor_type.name for t in reader.tensors if t.name in names})
    return (
        f"OpenVINO GenAI rounds the zero points of {len(names)} tensors ({', '.join(kinds)}) to 4 bits: it runs "
        f"weights that lie {(moved / norm) ** 0.5:.1%} of their norm beside those of the file; open it in torch, or "
        "take a type without zero points (Q4_0, Q8_0)"
    )


def _moved(tensor: ReaderTensor) -> Iterator[float]:
    """The squared change of a tensor's weights by rounded zero points, and their square; nothing without such points.

    A weight is `scale * code + least`, and its zero point `-least / scale`, which the reader takes from halves, rounds,
    and keeps modulo 16: the least weight of a group is then that many scales below 0.
    """
    from gguf import GGML_QUANT_SIZES, dequantize

    kind = tensor.tensor_type
    if kind.name not in ("Q4_1", "Q4_K"):
        return
    blocks = tensor.data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    blocks = blocks[:: max(1, len(blocks) // LOOKED_AT)]
    scales, least = _grid(blocks, kind.name)
    off = -least - _zeros_there(scales, least) * scales
    yield float((off**2).sum()) * 32  # weights that share a scale
    yield float((dequantize(np.ascontiguousarray(blocks), kind).astype(np.float64) ** 2).sum())


def _zeros_there(scales: np.ndarray, least: np.ndarray) -> np.ndarray:
    """The zero points that the reader makes of scales and least values; 0 where the scale is 0."""
    low: np.ndarray = -least.astype(np.float16).astype(np.float64)
    unit: np.ndarray = scales.astype(np.float16).astype(np.float64)
    zeros: np.ndarray = np.floor(np.divide(low, unit, out=np.zeros_like(unit), where=unit != 0) + 0.5) % 16
    return zeros


def _grid(blocks: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The scales and the least values of every 32 weights, from the bytes of blocks (blocks, bytes)."""
    from gguf.quants import Q4_K

    two = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float64)  # (blocks, 2)
    if kind.endswith("_1"):
        return two[:, 0], two[:, 1]
    scales, least = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return (two[:, :1] * scales).ravel(), (-two[:, 1:] * least).ravel()
