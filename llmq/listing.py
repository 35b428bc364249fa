"""What there is to write in a recipe, told on a terminal."""

from collections.abc import Mapping
from pathlib import Path

from llmq import plugin
from llmq.files import bundled
from llmq.types import Plugin


def everything() -> dict[str, dict[str, str]]:
    """Every word, recipe and suite, with a line on each."""
    found = {"words": plugin.words()}
    for kind, pattern in (("recipes", "*/*.yaml"), ("evals", "*.yaml")):
        files = sorted(bundled(kind).glob(pattern))
        found[kind] = {str(f.relative_to(bundled(kind)).with_suffix("")): _what(f) for f in files}
    return found


def _what(file: Path) -> str:
    return file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# What:").strip()


def as_text(found: Mapping[str, Mapping[str, str]]) -> str:
    """Titled lists."""
    titled = ((title, (f"  {name:<22} {what}" for name, what in entries.items())) for title, entries in found.items())
    return "\n".join(line for title, lines in titled for line in (title, *lines))


def settings_of(word: str, cls: type[Plugin]) -> str:
    """What a word does, and a line on each of its settings."""
    lines = [f"{word}: {cls.__doc__}\n"]
    for name, field in cls.model_fields.items():
        default = "needed" if field.is_required() else f"= {field.default!r}"
        lines.append(f"  {name:<30} {default:<16} {field.description or ''}".rstrip())
    return "\n".join(lines)
