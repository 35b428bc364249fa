"""The demand that a search has to meet: bytes or bits at most, a divergence or a perplexity at most."""

import re
from dataclasses import dataclass
from math import inf, log
from typing import TYPE_CHECKING

from llmq.artifact import Artifact
from llmq.errors import UserError

if TYPE_CHECKING:
    from llmq.text.family import LanguageModel
    from llmq.text.sensitivity import Sizes

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def budget_bytes(size: str, base: "Artifact[LanguageModel]") -> int:
    """The bytes that `0.40x` (of the base), `100MB` or `95MiB` stand for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(x|[kmg]i?b)?", str(size).strip().lower())
    if not match or not 0 < float(match[1]) < inf:
        raise UserError(f"--size {size!r}: a share of the base such as 0.40x, or bytes such as 100MB")
    number, unit = float(match[1]), match[2] or ""
    return int(number * (base.bytes_on_disk if unit == "x" else UNITS[unit]))


def ratio_of(perplexity: str) -> float:
    """The number of `1.05x`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*x", str(perplexity).strip().lower())
    if not match or not 1 < float(match[1]) < inf:
        raise UserError(f"--perplexity {perplexity!r}: a multiple of the base's, above 1, such as 1.05x")
    return float(match[1])


@dataclass(frozen=True)
class Budget:
    """Bytes on disk at most, bits a quantized weight at most, a divergence at most, or a perplexity at most."""

    size: str | None = None
    bits: float | None = None
    kl: float | None = None
    perplexity: str | None = None

    def __post_init__(self) -> None:
        names = [name for name in ("size", "bits", "kl", "perplexity") if getattr(self, name) is not None]
        if len(names) != 1:
            raise UserError(
                f"{' and '.join(f'--{name}' for name in names) or 'no budget'}: "
                "name one of --size, --bits, --kl, --perplexity"
            )
        if any(value is not None and not 0 < value < inf for value in (self.bits, self.kl)):
            raise UserError(f"--{names[0]} {getattr(self, names[0])}: a number above 0")
        if self.perplexity is not None:
            ratio_of(self.perplexity)

    def bytes(self, sizes: "Sizes", base: "Artifact[LanguageModel]") -> int | None:
        """The bytes of the stage at most; None for a budget of quality."""
        if self.bits is not None:
            return sizes.rest + int(self.bits * sizes.weights / 8)
        return budget_bytes(self.size, base) if self.size is not None else None

    @property
    def nats(self) -> float | None:
        """The nats a token at most, of the divergence or of the loss beyond the base's; None for a budget of bytes.

        Where the base knows the text well, the loss rises by about the divergence.
        """
        return log(ratio_of(self.perplexity)) if self.perplexity is not None else self.kl
