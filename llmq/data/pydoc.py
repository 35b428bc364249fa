"""The Python reference manual in `pydoc_data.topics`: about 460,000 characters of English on every machine.

Some topics are chapters of others ("if" is part of "compound"). Topics that share a paragraph are kept on one side
of the split, and a text that stands twice is used once.
"""

import hashlib
from typing import ClassVar

from pydantic import Field

from llmq.text import rows
from llmq.types import Data, Expected, Split

SHARED_PARAGRAPH = 60  # characters; shorter ones ("See also:") stand in many topics by chance


class Pydoc(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})

    held_out: float = Field(0.1, gt=0, lt=0.5, description="share of the characters set aside")

    def expected(self) -> Expected:
        whole = 465_000
        held_out = int(self.held_out * whole)
        return Expected(0, 0, characters=(whole - held_out, held_out))

    def read(self) -> Split:
        from pydoc_data.topics import topics

        families = list(_families(topics).values())
        wanted = self.held_out * sum(len(topics[t]) for family in families for t in family)
        held_out: set[str] = set()
        # Small families first would hold out only dictionary entries; an order by hash takes them as they come.
        for family in sorted(families, key=lambda f: hashlib.sha256(f[0].encode()).hexdigest()):
            length = sum(len(topics[t]) for t in family)
            if length <= wanted:
                held_out.update(family)
                wanted -= length
        sides: tuple[list[rows.Row], list[rows.Row]] = ([], [])
        inside = 0
        for family in families:
            for name in family:
                if any(
                    other != name and topics[name] in topics[other] and (topics[name] != topics[other] or other < name)
                    for other in family
                ):
                    inside += 1
                else:
                    sides[name in held_out].append({"text": topics[name].rstrip()})
        return rows.make_split(*sides, "text", {"inside_another": inside})


def _families(topics: dict[str, str]) -> dict[str, list[str]]:
    family_of = {name: name for name in topics}
    first_with: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= SHARED_PARAGRAPH:
                other = family_of[first_with.setdefault(key, name)]
                mine = family_of[name]
                if mine != other:
                    family_of.update({n: other for n, f in family_of.items() if f == mine})
    families: dict[str, list[str]] = {}
    for name in sorted(topics):
        families.setdefault(family_of[name], []).append(name)
    return families
