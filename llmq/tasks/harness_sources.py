"""What answers depend on besides settings and rows: code that is no library's, files that it reads, its environment.

A task's functions may import a helper from anywhere, and read what they like. Every loaded module that is neither a
library nor llmq counts, so do files that such code opened, and environment variables that it names.
"""

import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from llmq.files import sha256_text

NAMED = re.compile(r"(?:environ(?:\.get)?\s*[\[(]|getenv\s*\()\s*[\"']([^\"']+)[\"']")
ASKED = re.compile(r"\b(?:environ|getenv)\b")
_opened: set[str] = set()


@cache
def _libraries() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
    folders = {os.path.realpath(sysconfig.get_path(name)) for name in names}
    return tuple(sorted(folder + os.sep for folder in folders))


@cache
def _harness() -> str:
    import lm_eval

    return os.path.realpath(Path(lm_eval.__file__).parent) + os.sep


@cache
def _own() -> str:
    return os.path.realpath(Path(__file__).parent.parent) + os.sep


@cache
def _whose(file: str) -> str:
    """Whether a source file is `llmq`'s, of the `harness`, of a `library`, of `import` itself, or a `person`'s."""
    if file.startswith("<frozen importlib"):
        return "import"
    if file.startswith("<"):
        return "library"
    real = os.path.realpath(file)
    if real.startswith(_own()):
        return "llmq"
    if real.startswith(_harness()):
        return "harness"
    within = {"site-packages", "dist-packages"} & set(Path(real).parts)
    return "library" if within or real.startswith(_libraries()) else "person"


@cache
def watch() -> None:
    """From now on, note each file that a person's code opens, directly or through a library. Cannot be undone."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and _by_a_person(sys._getframe(1)):
            _opened.add(os.path.abspath(arguments[0]))

    sys.addaudithook(hook)


def _by_a_person(frame: FrameType | None) -> bool:
    """Whether the nearest caller that is no library is a person's code; `import` reads modules, which count anyway."""
    while frame:
        whose = _whose(frame.f_code.co_filename)
        if whose != "library":
            return whose == "person"
        frame = frame.f_back
    return False


def sha256(functions: Iterable[Callable[..., Any]]) -> str:
    """One hash over all such code, as far as it is loaded or these functions reach it; its files; its environment."""
    code = {*_modules(), *_reached(functions)}
    texts = {file: _bytes(file) for file in sorted(code)}
    return sha256_text(
        *(f"{Path(file).name} {_hash(text)}" for file, text in texts.items()),
        *(f"read {file} {_hash(_bytes(file))}" for file in sorted(_opened)),
        *_environment(text.decode("utf-8", "replace") for text in texts.values()),
    )


def _hash(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def _bytes(file: str) -> bytes:
    return Path(file).read_bytes() if os.path.isfile(file) else b""


def _modules() -> Iterator[str]:
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        # Some libraries make modules up, with the name of a file that there is none of.
        if isinstance(file, str) and os.path.isfile(file) and _whose(file) == "person":
            yield os.path.realpath(file)


def _reached(functions: Iterable[Callable[..., Any]]) -> set[str]:
    """The files of functions, and of functions and modules that they name, which need not be among `sys.modules`."""
    found: set[str] = set()
    seen: set[int] = set()
    left: list[Any] = list(functions)
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, ModuleType) and isinstance(thing.__file__, str) and _whose(thing.__file__) == "person":
            found.add(os.path.realpath(thing.__file__))
            left += vars(thing).values()
        elif isinstance(code := getattr(thing, "__code__", None), CodeType) and _whose(code.co_filename) == "person":
            found.add(os.path.realpath(code.co_filename))
            left += thing.__globals__.values() if isinstance(thing, FunctionType) else ()
    return found


def _environment(texts: Iterable[str]) -> Iterator[str]:
    """The variables that code names; all there are, where it reads some without their names in plain sight."""
    for text in texts:
        names = NAMED.findall(text)
        if len(ASKED.findall(text)) > len(names) + len(re.findall(r"from os import [\w, ]*(?:environ|getenv)", text)):
            names = sorted(os.environ)
        yield from (f"{name}={os.environ.get(name)}" for name in names)
