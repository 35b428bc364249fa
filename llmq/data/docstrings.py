"""Functions of Python's standard library, read and never imported: code as prompt, its docstring as completion.

The prompt is the function without its docstring, the completion the docstring's first paragraph. Split by module.
"""

import ast
import hashlib
import json
import platform
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from llmq.files import cache, write_text
from llmq.text import rows
from llmq.types import Data, Split

QUESTION = '\n\n# The docstring of this function:\n"""'
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


class Docstrings(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    shapes: ClassVar[frozenset[str]] = frozenset({"prompt/completion"})

    held_out: float = Field(0.1, gt=0, lt=0.5, description="share of the modules set aside")
    max_characters: int = Field(1200, ge=100, description="leave longer functions out")

    def read(self) -> Split:
        sides: tuple[list[rows.Row], list[rows.Row]] = ([], [])
        seen: set[str] = set()
        skipped = {"too_long": 0, "duplicate": 0}
        for module, prompt, completion in self._pairs():
            if len(prompt) > self.max_characters:
                skipped["too_long"] += 1
            elif prompt in seen:
                skipped["duplicate"] += 1
            else:
                seen.add(prompt)
                share = int(hashlib.sha256(module.encode()).hexdigest()[:8], 16) / 2**32
                sides[share < self.held_out].append({"prompt": prompt, "completion": completion})
        return rows.make_split(*sides, "prompt/completion", skipped)

    def _pairs(self) -> list[tuple[str, str, str]]:
        # Parsing the library takes seconds, and the result depends on the version of Python alone.
        file = cache("data", f"docstrings-2-python-{platform.python_version()}.json")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(list(_pairs_of_library(Path(sysconfig.get_path("stdlib"))))))
        return [(m, p, c) for m, p, c in json.loads(file.read_text(encoding="utf-8"))]


def _pairs_of_library(root: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if LEFT_OUT.isdisjoint(module.parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (pair := _pair(node, source)):
                    yield str(module), *pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, source: str) -> tuple[str, str] | None:
    doc = ast.get_docstring(node)
    if not doc or len(node.body) < 2:
        return None
    lines = source.split("\n")  # not `splitlines`: for `ast` a form feed ends no line
    first, string = node.body[0], node.body[0].end_lineno or 0
    if first.lineno <= node.lineno:
        return None
    code = lines[node.lineno - 1 : first.lineno - 1] + lines[string : node.end_lineno]
    completion = " ".join(doc.split("\n\n")[0].split())
    if len(completion) < 15:
        return None
    return textwrap.dedent("\n".join(line for line in code if line.strip())) + QUESTION, completion
