"""What was seen to work: a table of architectures and words that a slow test writes.

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


def foretold(model: Model, parts: Iterable[Plugin]) -> Iterator[str]:
    """What the table says of a local model's architecture under each word that refused it, a line each."""
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
            if part.word == word and row[column] != RIGHT and getattr(part, "bits", None) in (None, *_bits(column)):
                yield f"{part.word} refused a tiny {architecture}: {row[column]}"


def _bits(column: str) -> tuple[int, ...]:
    return (int(column[-1]),) if column.startswith("bnb") else (2, 3, 4, 8)


def page() -> str:
    """The tables as `docs/support.md`: a mark a cell, and below each table the lines in which llmq refuses."""
    parts = [HEAD]
    for kind in ("text", "vision"):
        if table(kind).exists():
            parts += [f"## {kind.capitalize()}", *_drawn(cells(kind))]
    return "\n\n".join(parts) + "\n"


HEAD = """# What works

Every architecture under every word, tried on a tiny random model by a test that writes this page: ✓ is right by an
oracle of its own (opened again to the same logits or outputs, by plain transformers where it can), a number is the line
below in which llmq refuses. Nothing else happens."""


def _drawn(rows: Cells) -> Iterator[str]:
    columns = list(next(iter(rows.values())))
    refusals = list(dict.fromkeys(line for row in rows.values() for line in row.values() if line != RIGHT))
    numbers = {RIGHT: "✓", **{line: str(i) for i, line in enumerate(refusals, 1)}}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(numbers[row[c]] for c in columns)} |" for name, row in rows.items()]
    yield "\n".join(lines)
    yield "\n".join(f"{i}. {line}" for i, line in enumerate(refusals, 1))
