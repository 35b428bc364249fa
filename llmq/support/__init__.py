"""What was seen to work: a table of architectures and words that a slow test writes.

`text.json` and `vision.json` lie beside this file: `{"versions": …, "cells": {architecture: {column: outcome}}}`, an
outcome being `right`, or the one line in which llmq refuses.
"""

import json
from collections.abc import Mapping
from pathlib import Path

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
}
"""Column -> the word that it stands for; `lora` is LoRA and the merge of it."""

Cells = Mapping[str, Mapping[str, str]]


def table(kind: str) -> Path:
    """The file of one table: `text` or `vision`."""
    return Path(__file__).parent / f"{kind}.json"


def cells(kind: str) -> Cells:
    """Architecture -> column -> outcome."""
    found: Cells = json.loads(table(kind).read_text(encoding="utf-8"))["cells"]
    return found


def write(kind: str, architecture: str, row: Mapping[str, str]) -> None:
    """Put the row of one architecture into a table, with the versions of the libraries that it was seen with."""
    from llmq.environment import LIBRARIES, library_version
    from llmq.files import write_json

    file = table(kind)
    known = dict(cells(kind)) if file.exists() else {}
    rows = dict(sorted({**known, architecture: row}.items()))
    write_json(file, {"versions": {name: library_version(name) for name in LIBRARIES}, "cells": rows})
