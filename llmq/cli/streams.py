"""Standard streams that were closed before the start, or that know fewer characters than llmq prints."""

import codecs
import os
import sys
from contextlib import suppress

PLAIN = dict(zip("×±▲▼↑↓→←·—≤≥…", "x~+-^v><.-<>.", strict=True))
"""One character for one, so that columns stay in line; the legends change alike."""


def prepare() -> None:
    """Send what a closed stream would get to nowhere, and print what an encoding lacks by signs or as escapes."""
    codecs.register_error("plain", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the whole process
        elif hasattr(stream, "reconfigure"):
            with suppress(OSError):
                stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end
