"""Writing the tables of what works, and `docs/support.md` out of them."""

from collections.abc import Iterator, Mapping

from llmq import support
from llmq.environment import LIBRARIES, library_version
from llmq.files import write_json

HEAD = """# What works

Every architecture under every word, tried on a tiny random model by a test that writes this page: ✓ is right by an
oracle of its own (opened again to the same logits or outputs, by plain transformers where it can), a number is the line
below in which llmq refuses. Nothing else happens."""


def write(kind: str, architecture: str, row: Mapping[str, str]) -> None:
    """Put the row of one architecture into a table, with the versions of the libraries that it was seen with."""
    file = support.table(kind)
    known = dict(support.cells(kind)) if file.exists() else {}
    rows = dict(sorted({**known, architecture: row}.items()))
    write_json(file, {"versions": {name: library_version(name) for name in LIBRARIES}, "cells": rows})


def page() -> str:
    """The tables as `docs/support.md`: a mark a cell, and below each table the lines in which llmq refuses."""
    parts = [HEAD]
    for kind in ("text", "vision"):
        if support.table(kind).exists():
            parts += [f"## {kind.capitalize()}", *_drawn(support.cells(kind))]
    return "\n\n".join(parts) + "\n"


def _drawn(rows: support.Cells) -> Iterator[str]:
    columns = list(next(iter(rows.values())))
    refusals = list(dict.fromkeys(line for row in rows.values() for line in row.values() if line != support.RIGHT))
    numbers = {support.RIGHT: "✓", **{line: str(i) for i, line in enumerate(refusals, 1)}}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(numbers[row[c]] for c in columns)} |" for name, row in rows.items()]
    yield "\n".join(lines)
    yield "\n".join(f"{i}. {line}" for i, line in enumerate(refusals, 1))
