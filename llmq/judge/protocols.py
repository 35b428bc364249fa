"""Checks that two figures were taken by one protocol, whatever their values are. Pure."""

import re

from llmq.statistics.pairing import pairs
from llmq.types import Measurement

SIZE = "bytes_on_disk"
QUALITY = ("psnr_gain", "frechet_distance", "psnr", "map", "top1", "top1_agreement", "token_perplexity", "acc")
"""The figure of quality that a kind of model lives by; the first that was measured counts."""
SPEED = ("decode_tokens_per_second", "images_per_second")
HEADLINE = (SIZE, *(metric for metric in QUALITY if metric != "psnr_gain"), *SPEED)
"""The metrics that most people look for first; a gain over bicubic differs from the base's as the PSNR does."""
HARNESS = re.compile(r"^lm-eval [^,]+, ")  # the version of the task, and the hash of what was asked, say enough

LEFT_OUT = re.compile(r"[,;] [\d,]+(?: of [\d,]+)? [\w ]+ left (?:out|unscored)")
"""Counts of questions in a protocol, ignored where samples pair by document, as counts are results."""

RUNTIME = re.compile(r"\b(?:torch|openvino) in (?=\w)")
"""The runtime may differ: a graph is compared with the network that it was exported from, on the same device and
threads, and in the same precision (`environment.where_it_runs`)."""

EXPORTED = re.compile(r"(?:[,;] |\b)(?:torch in|openvino at) \w+(?: with int8 activations|, keys and values \w+)?")
"""A language model's export has a precision of its own (`Model.runs_in`), in which its quality was measured, too."""


def refused(m: Measurement, base: Measurement) -> str:
    """The reason not to compare two figures of one task and metric, or nothing."""
    return unlike(m, base) or unpaired(m, base)


def unlike(m: Measurement, base: Measurement) -> str:
    """The difference in protocol that forbids comparing two figures of one task and metric; empty if there is none.

    The check holds within one run, too: times on another device, or with other threads, are no measure of speed.
    """
    for what, x, y in (("units", m.unit, base.unit), ("directions", m.better, base.better)):
        if x != y:
            return f"unlike {what}, {x} against {y}"
    runtime = EXPORTED if any("openvino at " in one.convention for one in (m, base)) else RUNTIME
    protocols = [runtime.sub("", HARNESS.sub("", one.convention)) for one in (m, base)]
    if m.samples and base.samples and m.samples.ids and base.samples.ids:
        protocols = [LEFT_OUT.sub("", protocol) for protocol in protocols]
    if protocols[0] != protocols[1]:
        return _what_differs(*protocols)
    return ""


def unpaired(m: Measurement, base: Measurement) -> str:
    """The reason that the samples of two figures do not pair, or nothing."""
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


def is_size(m: Measurement) -> bool:
    """True for a figure that counts bytes, which depend on a dtype."""
    return m.exact and m.unit == "bytes"


def stored_otherwise(stage: str, base: str) -> str:
    """The dtypes in which a stage and the base are stored, where a part of their ratio of sizes is due to these.

    Packed weights beside a base of 4 bytes a weight are told too: beside one of 2 their ratio would be twice as large.
    """
    packed, _, floats = stage.rpartition(" and ")
    wide = base in ("float32", "float64")
    alike = floats == base or {floats, base} == {"float16", "bfloat16"}  # two bytes a weight either way
    if not (base and stage) or stage == base or (alike and not (packed and wide)):
        return ""
    return f"stored as {stage}, the base as {base}"


def _what_differs(x: str, y: str) -> str:
    parts = [[p.strip() for p in re.split(r"[,;]", protocol)] for protocol in (x, y)]
    only = [", ".join(p for p in mine if p not in theirs) or "not said" for mine, theirs in (parts, parts[::-1])]
    return f"unlike protocols, {only[0]!r} against {only[1]!r}"
