"""GGUF files written again with other bytes in place of some tensors, as other houses write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

Other = Callable[[Any], tuple[np.ndarray, GGMLQuantizationType] | None]


def written_again(source: Path, file: Path, other: Other, said: int) -> None:
    """Write `source` to `file`, tensors replaced by what `other` gives for them; `said` is its general.file_type."""
    reader, writer = GGUFReader(source), GGUFWriter(file, "llama")
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            value = said if field.name == "general.file_type" else field.contents()
            writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data, kind = other(tensor) or (tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
