"""GGUF files: the parts of a split one, and its conversion to safetensors."""

import json
import re
from collections import Counter
from pathlib import Path

from llmq.errors import UserError

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
UNUSED = re.compile(r"rope_freqs|rope_factors|attn_rot_embd|nextn")
"""Tensors that transformers computes by itself or does not run: rotary tables, layers that predict further tokens."""


def parts_of(file: Path) -> list[Path]:
    """All parts of a split GGUF file, whichever of them is named. Raises `UserError` for one that is not there."""
    found = PART.fullmatch(file.name)
    if not found:
        return [file]
    count = int(found["count"])
    parts = [file.with_name(f"{found['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UserError(f"{str(file)!r} is one of {count} parts, and {', '.join(missing)} is not beside it")
    return parts


def convert(parts: list[Path], dtype: str, folder: Path) -> None:
    """Write what the parts hold, dequantized, as safetensors with a tokenizer. Raises `UserError` for what is amiss."""
    import torch
    from transformers import AutoTokenizer, GgufConfig

    from llmq.models.opening import causal_lm

    whole = parts[0] if len(parts) == 1 else joined(parts, folder / "whole.gguf")
    place = {"gguf_file": whole.name}
    model = causal_lm(
        whole.parent, **place, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    stored = _check_all_used(whole, model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(whole.parent), **place).save_pretrained(folder)
    if len(parts) > 1:
        whole.unlink()
    about = {"file": parts[0].name, "parts": len(parts), "stored_as": stored.most_common(1)[0][0]}
    (folder / "gguf.json").write_text(json.dumps(about), encoding="utf-8")


def _check_all_used(file: Path, model: object) -> Counter[str]:
    """How many weights are stored in each format. Raises `UserError` for tensors that no part of the network took."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    taken = get_gguf_hf_weights_map(model, processor)
    extra = [t.name for t in reader.tensors if t.name not in taken and not UNUSED.search(t.name)]
    if extra:
        shown = ", ".join(extra[:3])
        raise UserError(f"{str(file)!r} has {len(extra)} tensors that {type(model).__name__} does not take: {shown}")
    stored: Counter[str] = Counter()
    for tensor in reader.tensors:
        stored[tensor.tensor_type.name] += int(tensor.n_elements)
    return stored


def joined(parts: list[Path], file: Path) -> Path:
    """One GGUF file out of the parts of a split one: the description of the first, the tensors of all."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(part) for part in parts]
    promised = readers[0].fields.get("split.tensors.count")
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    if promised is not None and int(promised.contents()) != len(tensors):
        raise UserError(f"{str(parts[0])!r} promises {promised.contents()} tensors, and its parts hold {len(tensors)}")
    writer = GGUFWriter(file, str(readers[0].fields["general.architecture"].contents()))
    for field in readers[0].fields.values():
        if field.name != "general.architecture" and not field.name.startswith(("GGUF.", "split.")):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return file
