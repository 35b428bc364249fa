"""The facts below the table: the origin of each stage, the protocol of each figure, machine, data and gate."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from llmq.errors import in_bytes
from llmq.report import foretold
from llmq.report.numbers import POINTS, difference_of, interval, scaled, signed, times
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.report import Report
    from llmq.report.rows import Row

HASH = re.compile(r"[0-9a-f]{64}")
Facts = dict[str, list[tuple[str, str]]]


def facts(report: "Report", rows: "Iterable[Row]") -> Facts:
    """Lists of (name, text), by title."""
    environment = report.environment
    machine = ("processor", "device", "threads", "dtype", "seed", "python", "llmq", "commit", "model_sha256")
    data = ", ".join(f"{k} sha256 {v[:12]}" for k, v in environment["data_sha256"].items())
    libraries = ", ".join(f"{k} {v}" for k, v in environment["libraries"].items() if v)
    gate = {"Gate": [(v["verdict"], sentence(v)) for v in report.gate["rules"]]} if report.gate else {}
    read = [line.partition(" ") for line in environment.get("reads", ())]
    what = {"What was read": [(name, text) for name, _, text in read]} if read else {}
    found = {
        "Stages": [(s["name"], _stage(s)) for s in report.stages],
        "How each figure was taken": [(f"{r.task} {r.metric}", r.convention) for r in rows],
        "Machine": [
            *((k, str(environment[k])) for k in machine if environment.get(k) is not None),
            ("data", data),
            ("libraries", libraries),
        ],
    }
    beside = {"Foretold and measured": told} if (told := list(foretold.lines(report))) else {}
    return gate | what | beside | found


def _stage(stage: JsonObject) -> str:
    notes = {k: v for k, v in stage["notes"].items() if v not in (None, {}, [])}
    told = [f"{stage['seconds']:.1f} s", *(f"{k}: {_plain(v, k)}" for k, v in notes.items())]
    if (answered := (stage.get("asked") or {}).get("processes", 1)) > 1:
        told.append(f"answered by {answered} processes")
    reused = stage.get("reused")
    return "; ".join(
        told + ([f"not measured anew but kept from an earlier run: {', '.join(reused)}"] if reused else [])
    )


def _plain(value: object, key: str = "") -> str:
    if isinstance(value, Mapping):
        inner = {k: v for k, v in value.items() if not _is_curve(v)}  # curves are drawn, not listed
        return ", ".join(
            f"{k} ({_plain(v, k)})" if isinstance(v, Mapping) else f"{k} {_plain(v, k)}" for k, v in inner.items()
        )
    if key == "peak_memory" and isinstance(value, int):
        return in_bytes(value)
    return value[:12] if isinstance(value, str) and "sha256" in key and HASH.fullmatch(value) else str(value)


def _is_curve(value: object) -> bool:
    """True for points of a training, and for a list of none."""
    return isinstance(value, list) and all(isinstance(point, list) for point in value)


def sentence(v: JsonObject) -> str:
    """A rule, the figure, and the number of samples that would decide."""
    return "; ".join(_parts(v))


def _parts(v: JsonObject) -> Iterator[str]:
    yield f"{v['rule']}: {v['task']} {v['metric']} {_seen(v)}"
    if v["reason"]:
        yield v["reason"]
    if v.get("stored"):
        yield v["stored"]
    if said := left_out(v):
        yield said
    if v["verdict"] == "undecided" and v["ci95"]:
        yield f"{v['n']:,} samples are too few"
        if v["needed"]:
            yield f"about {v['needed']:,} would settle it, if the figure stays where it is"
        else:
            yield "the figure lies on its bound, which no number of samples settles"
        if v["fine"]:
            yield f"to see {'1 pt' if v['points'] and v['kind'] != 'ratio' else '1 %'} takes {v['fine']:,}"


def left_out(c: JsonObject) -> str:
    """The documents of a comparison or a ruling that have no pair, or nothing."""
    if not (c.get("only_stage") or c.get("only_base")):
        return ""
    return (
        f"judged on the {c['n']:,} documents that both scored; left out: {c['only_stage']:,} that only the stage "
        f"scored, {c['only_base']:,} that only the base scored"
    )


def _seen(v: JsonObject) -> str:
    """What a rule bounds, with the interval, as the table shows such figures."""
    if v["kind"] == "ratio":
        return f"{times(v['value'], v['ci95'], 'x', 3)} of the base"
    scale, unit = scaled(v["unit"])
    factor, name = (scale, f" {unit}" if scale != 1 else "")
    if v["kind"] == "difference":
        factor, name = POINTS if v["points"] else difference_of(v["unit"]) or (factor, name)
    shown = signed if v["kind"] == "difference" else _four_digits
    return f"{shown(v['value'] * factor)}{name}{interval(v['ci95'], factor, shown)}"


def _four_digits(value: float) -> str:
    return f"{value:,.4g}"
