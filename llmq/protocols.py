"""Whether two figures speak of the same thing: how they were taken, never what came out. Pure."""

import re

from llmq.pairing import pairs
from llmq.types import Measurement

HARNESS = re.compile(r"^lm-eval [^,]+, ")  # the version of the task, and the hash of what was asked, say enough

LEFT_OUT = re.compile(r"[,;] [\d,]+(?: of [\d,]+)? [\w ]+ left (?:out|unscored)")
"""What came out of asking; of samples that name their documents the pairs say it better."""

RUNTIME = re.compile(r"\b(?:torch|openvino) in (?=\w)")
"""A graph beside the network that it was made of is the comparison that is asked for: on the same device and threads,
and in the same precision (`environment.where_it_runs`)."""


def refused(m: Measurement, base: Measurement) -> str:
    """Why two figures of one task and metric are not compared, or nothing."""
    return unlike(m, base) or unpaired(m, base)


def unlike(m: Measurement, base: Measurement) -> str:
    """Why the two figures of one task and metric cannot be set side by side, or nothing.

    It holds within one run as between two: a stage on another device, or on other threads, is no measure of speed.
    """
    for what, x, y in (("units", m.unit, base.unit), ("directions", m.better, base.better)):
        if x != y:
            return f"unlike {what}, {x} against {y}"
    protocols = [RUNTIME.sub("", HARNESS.sub("", one.convention)) for one in (m, base)]
    if m.samples and base.samples and m.samples.ids and base.samples.ids:
        protocols = [LEFT_OUT.sub("", protocol) for protocol in protocols]
    if protocols[0] != protocols[1]:
        return _what_differs(*protocols)
    return ""


def unpaired(m: Measurement, base: Measurement) -> str:
    """Why the samples of two figures do not pair, or nothing."""
    if not (m.samples and base.samples):
        return ""
    counts = [len(one.samples.values) for one in (m, base) if one.samples]
    if counts[0] != counts[1] and not (m.samples.ids and base.samples.ids):
        return f"unlike samples, {counts[0]} against {counts[1]}"
    try:
        pairs(m.samples, base.samples)
    except ValueError as error:
        return str(error)
    return ""


def _what_differs(x: str, y: str) -> str:
    parts = [[p.strip() for p in re.split(r"[,;]", protocol)] for protocol in (x, y)]
    only = [", ".join(p for p in mine if p not in theirs) or "not said" for mine, theirs in (parts, parts[::-1])]
    return f"unlike protocols, {only[0]!r} against {only[1]!r}"
