"""One hash over user code, files that the code reads, and environment variables that it names: answers depend on all.

A task's functions may import a helper from anywhere, and read any file. Every loaded module that is neither a
library nor llmq counts; so do files that such code opened.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType

from llmq.files import sha256_text

NAMED = re.compile(r"(?:environ(?:\.get)?\s*[\[(]|getenv\s*\()\s*[\"']([^\"']+)[\"']")
ASKED = re.compile(r"\b(?:environ|getenv)\b")
_opened: set[str] = set()


@cache
def _owners() -> tuple[tuple[str, str], ...]:
    """Folders, the innermost first, and the owner of the code in each."""
    import lm_eval

    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")}
    folders = [(Path(__file__).parent.parent, "llmq"), (Path(lm_eval.__file__).parent, "harness")]
    folders += [(Path(folder), "library") for folder in libraries]
    return tuple((os.path.realpath(folder) + os.sep, owner) for folder, owner in folders)


@cache
def _owner(file: str) -> str:
    """The owner of a source file: `llmq`, the `harness`, a `library`, `import` itself, or a `person`."""
    if file.startswith("<frozen importlib"):
        return "import"
    if file.startswith("<"):
        return "library"
    real = os.path.realpath(file)
    otherwise = "library" if {"site-packages", "dist-packages"} & set(Path(real).parts) else "person"
    return next((owner for folder, owner in _owners() if real.startswith(folder)), otherwise)


@cache
def watch() -> None:
    """Record each file that user code opens from now on, directly or through a library. Cannot be undone."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and _by_a_person(sys._getframe(1)):
            _opened.add(os.path.abspath(arguments[0]))

    sys.addaudithook(hook)


def _by_a_person(frame: FrameType | None) -> bool:
    """True where the nearest caller that is no library is user code; modules that `import` reads count anyway."""
    while frame:
        owner = _owner(frame.f_code.co_filename)
        if owner != "library":
            return owner == "person"
        frame = frame.f_back
    return False


def sha256(functions: Iterable[Callable[..., object]]) -> str:
    """One hash over user code, loaded or reached by these functions, with the files and variables that it reads."""
    texts = {file: _text(file) for file in sorted({*_modules(), *_reached(functions)})}
    told = [part for file, text in texts.items() for part in (Path(file).name, text)]
    told += [part for file in sorted(_opened) for part in (f"read {file}", _text(file))]
    return sha256_text(*told, *(variable for text in texts.values() for variable in _environment(text)))


def _text(file: str) -> str:
    """The bytes of a file, each as one character; empty if it is gone."""
    return Path(file).read_bytes().decode("latin-1") if os.path.isfile(file) else ""


def _modules() -> Iterator[str]:
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        # Some libraries create modules whose file does not exist.
        if isinstance(file, str) and os.path.isfile(file) and _owner(file) == "person":
            yield os.path.realpath(file)


def _reached(functions: Iterable[Callable[..., object]]) -> set[str]:
    """The files of functions, and of functions and modules that they name, which need not be among `sys.modules`."""
    files: set[str] = set()
    seen: set[int] = set()
    left: list[object] = list(functions)
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, ModuleType) and isinstance(thing.__file__, str) and _owner(thing.__file__) == "person":
            files.add(os.path.realpath(thing.__file__))
            left += vars(thing).values()
        elif isinstance(code := getattr(thing, "__code__", None), CodeType) and _owner(code.co_filename) == "person":
            files.add(os.path.realpath(code.co_filename))
            left += thing.__globals__.values() if isinstance(thing, FunctionType) else ()
    return files


def _environment(text: str) -> Iterator[str]:
    """The environment variables that code names; all of them if the code reads some by computed names."""
    names = NAMED.findall(text)
    if len(ASKED.findall(text)) > len(names) + len(re.findall(r"from os import [\w, ]*(?:environ|getenv)", text)):
        names = sorted(os.environ)
    yield from (f"{name}={os.environ.get(name)}" for name in names)
