"""The grammar of a gate's rules: one bound on one figure. Nothing is measured here."""

import re
from dataclasses import dataclass, replace

from llmq.errors import UserError

GRAMMAR = (
    "write 'METRIC <= 1.03x base', 'METRIC >= base - 1.0pt', 'METRIC <= base + 0.2' or 'METRIC <= 12' "
    "(<=, >=, < or >; pt: percentage points; 450MB, 60%)"
)
NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+"
RULE = re.compile(r"(?P<metric>[^<>=≤≥]+?)\s*(?P<sign><=|>=|<|>|≤|≥)\s*(?P<bound>[^<>=≤≥]+)")
TIMES = re.compile(rf"(?P<number>{NUMBER})\s*[x×*]\s*base")
OFFSET = re.compile(rf"base(?:\s*(?P<minus>[+−-])\s*(?P<number>{NUMBER})\s*(?P<unit>pt)?)?")
PLAIN = re.compile(rf"(?P<minus>[−-])?(?P<number>{NUMBER})\s*(?P<unit>kB|MB|GB|%)?")
UNITS = {"": 1.0, "pt": 0.01, "%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Rule:
    """`metric` is at most, or at least, a bound: a number, or the base's figure times `factor` or plus `offset`."""

    text: str
    metric: str
    at_most: bool
    strict: bool
    number: float | None = None
    factor: float | None = None
    offset: float = 0.0
    unit: str = ""

    @property
    def is_relative(self) -> bool:
        """True for a bound that is relative to the base."""
        return self.number is None

    @property
    def bound(self) -> float:
        """The bound on the ratio to the base, the difference from it, or the figure itself."""
        return self.number if self.number is not None else self.factor if self.factor is not None else self.offset

    def allows(self, value: float) -> bool:
        """True if a value lies on the right side of the bound."""
        if value == self.bound:
            return not self.strict
        return (value < self.bound) == self.at_most


def read_rule(text: str) -> Rule:
    """Read `perplexity <= 1.03x base`. Raises `UserError` with the grammar."""
    whole = RULE.fullmatch(text.strip())
    if not whole:
        raise UserError(f"rule {text!r} cannot be read: {GRAMMAR}")
    sign, bound = whole["sign"], whole["bound"].strip()
    rule = Rule(text, whole["metric"].strip(), sign in ("<=", "<", "≤"), sign in ("<", ">"))
    if found := TIMES.fullmatch(bound):
        return replace(rule, factor=float(found["number"]))
    found = OFFSET.fullmatch(bound) or PLAIN.fullmatch(bound)
    if not found:
        raise UserError(f"rule {text!r}: {bound!r} is no bound: {GRAMMAR}")
    unit = found["unit"] or ""
    size = float(found["number"] or 0) * UNITS[unit] * (-1 if found["minus"] in ("-", "−") else 1)
    if found.re is OFFSET:
        return replace(rule, offset=size, unit=unit)
    return replace(rule, number=size, unit=unit)
