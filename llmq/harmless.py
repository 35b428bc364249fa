"""Names and data made safe to show: no character moves a cursor, hides, or is taken for markup.

One function for each format: `errors.visible` for the terminal and for files of text, `cell` for rich's tables,
`markdown` and `fenced` for `report.md`; the page is escaped by its template, and gets `visible` text, too.
"""

import re
from typing import TYPE_CHECKING, Any

from llmq.errors import visible

if TYPE_CHECKING:
    from rich.text import Text

MARKDOWN = re.compile(r"[\\`*|$]|~~|<(?=[A-Za-z/!?])|^\[|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
BRACKETS = re.compile(rf"{MARKDOWN.pattern}|[\[\]]")
"""Characters that GitHub's Markdown would take for more than text within a line."""


def visible_within(data: object) -> Any:
    """Nested data with every text made visible, keys included."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, dict):
        return {visible_within(key): visible_within(value) for key, value in data.items()}
    return [visible_within(each) for each in data] if isinstance(data, list | tuple) else data


def cell(text: object, style: str = "") -> "Text":
    """Text for a table of rich, which would take `[/x]` in a plain string for markup."""
    from rich.text import Text

    return Text(visible(str(text)), style)


def markdown(text: object) -> str:
    """Text within a line of Markdown; line breaks are shown."""
    return _escaped(text, MARKDOWN)


def alternative(text: object) -> str:
    """The text of a picture in Markdown, which any bracket would end."""
    return _escaped(text, BRACKETS)


def _escaped(text: object, special: re.Pattern[str]) -> str:
    shown = special.sub(lambda mark: f"\\{mark[0]}", visible(str(text)))
    return re.sub(r"\s*\n\s*", " ⏎ ", shown.strip()).replace("~~", "~\\~")


def fenced(text: str) -> str:
    """Text as a block of Markdown, in a fence that is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"
