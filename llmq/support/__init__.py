"""The architectures and words that work: tables that a slow test writes.

`text.json` and `vision.json` lie beside this file: `{"versions": …, "cells": {architecture: {column: outcome}}}`, an
outcome being `right`, or the one line in which llmq refuses.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from llmq.files import at_home
from llmq.types import Model, Plugin

RIGHT = "right"
TEXT_COLUMNS = {
    "bnb4": "quantize.bnb",
    "bnb8": "quantize.bnb",
    "gptq": "quantize.gptq",
    "rtn": "quantize.rtn",
    "wanda": "prune.wanda",
    "sparsegpt": "prune.sparsegpt",
    "layers": "prune.layers",
    "lora": "adapt.lora",
    "perplexity": "tasks.perplexity",
    "lm_eval": "tasks.lm_eval",
    "generate": "tasks.generate",
    "speed": "tasks.speed",
    "to_gguf": "export.gguf",
    "to_openvino": "export.openvino",
    "to_compressed": "export.compressed_tensors",
}
"""Column -> the word behind it; `lora` is LoRA with the merge, `to_compressed` is a stage of `quantize.rtn` written."""

Cells = Mapping[str, Mapping[str, str]]


def table(kind: str) -> Path:
    """The file of one table: `text` or `vision`."""
    return Path(__file__).parent / f"{kind}.json"


def cells(kind: str) -> Cells:
    """Architecture -> column -> outcome."""
    rows: Cells = json.loads(table(kind).read_text(encoding="utf-8"))["cells"]
    return rows


def foretold(model: Model, parts: Iterable[Plugin]) -> Iterator[str]:
    """A line for each word that refused the architecture of a local model, by the table."""
    folder = at_home(str(getattr(model, "weights", "")))
    if model.kind != "causal-lm" or not (folder / "config.json").is_file():
        return
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    row = cells("text").get(architecture)
    if row is None:
        yield f"{architecture} is none of the {len(cells('text'))} architectures that were tried (docs/support.md)"
        return
    for part in parts:
        for column, word in TEXT_COLUMNS.items():
            bits = (int(column[-1]),) if column.startswith("bnb") else (2, 3, 4, 8)
            if part.word == word and row[column] != RIGHT and getattr(part, "bits", None) in (None, *bits):
                yield f"{part.word} refused a tiny {architecture}: {row[column]}"
