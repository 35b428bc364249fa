"""The words: a listing of the plug-in folders, each file with the first line of its documentation.

Nothing is imported for it, so that `llmq list` answers at once.
"""

import ast
import importlib
import inspect
import os
from collections.abc import Iterator
from functools import cache
from tokenize import COMMENT, NL, STRING, TokenError, generate_tokens

PACKAGES = ("models", "data", "quantize", "prune", "adapt", "export", "tasks")
"""The folders in which every file, or folder with an `__init__.py`, is a word, and nothing else lies."""


def words() -> dict[str, str]:
    """Every word with the first line of its documentation, read off the files without importing one."""
    return dict(sorted(found for package in PACKAGES for found in _words_of(package)))


def _words_of(package: str) -> Iterator[tuple[str, str]]:
    # `os.scandir`: a check lists all words several times, and objects for the paths took 40 % of its time.
    for folder in importlib.import_module(f"llmq.{package}").__path__:
        with os.scandir(folder) as entries:
            for entry in entries:
                name, ending = os.path.splitext(entry.name)
                file = entry.path if ending == ".py" else os.path.join(entry.path, "__init__.py")
                if name != "__init__" and os.path.isfile(file):
                    yield f"{package}.{name}", _first_line(file, os.stat(file).st_mtime_ns)


@cache
def _first_line(file: str, changed: int) -> str:
    # `changed` makes the cache miss after a change. The first tokens are enough: parsing whole files takes 0.07 s.
    with open(file, encoding="utf-8") as opened:
        tokens = (token for token in generate_tokens(opened.readline) if token.type not in (COMMENT, NL))
        try:
            first = next(tokens)
        except TokenError as error:
            raise SyntaxError(f"{file}: {error}") from None
    return inspect.cleandoc(ast.literal_eval(first.string)).split("\n")[0] if first.type == STRING else ""
