"""Names and data as a person sees them: no character of theirs moves a cursor, hides, or is taken for markup.

One function for each face: `visible` for the terminal and for files of text, `cell` for rich's tables, `markdown` and
`fenced` for `report.md`; the page is escaped by its template, and gets what is `visible`, too.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Controls but the tab and the line break, what turns the direction of text, what has no width, halves of characters.

The joiners of Persian, Hindi and emoji (U+200C, U+200D) belong to the text.
"""
MARKDOWN = re.compile(r"[\\`*|$]|~~|<(?=[A-Za-z/!?])|^\[|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
BRACKETS = re.compile(rf"{MARKDOWN.pattern}|[\[\]]")
"""What GitHub's Markdown would take for more than text within a line."""


def visible(text: str) -> str:
    """Text whose unseen characters are spelled: `\\x1b` for an escape."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible_within(data: Any) -> Any:
    """Nested data, every text in it visible, names of keys too."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, dict):
        return {visible_within(key): visible_within(value) for key, value in data.items()}
    return [visible_within(each) for each in data] if isinstance(data, list | tuple) else data


def in_json(text: str) -> str:
    """JSON whose unseen characters are spelled as JSON spells them: it says the same."""
    return UNSEEN.sub(lambda found: "".join(f"\\u{unit:04x}" for unit in _units(found[0])), text)


def _units(character: str) -> list[int]:
    data = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]


def cell(text: object, style: str = "") -> "Text":
    """Text for a table of rich, which would read a plain one for markup: `[/x]`."""
    from rich.text import Text

    return Text(visible(str(text)), style)


def markdown(text: object) -> str:
    """Text within a line of Markdown; line breaks are shown."""
    return _escaped(text, MARKDOWN)


def alternative(text: object) -> str:
    """The text of a picture in Markdown, which any bracket would end."""
    return _escaped(text, BRACKETS)


def _escaped(text: object, special: re.Pattern[str]) -> str:
    shown = special.sub(lambda found: f"\\{found[0]}", visible(str(text)))
    return re.sub(r"\s*\n\s*", " ⏎ ", shown.strip()).replace("~~", "~\\~")


def fenced(text: str) -> str:
    """Text as a block of Markdown, in a fence that is longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"
