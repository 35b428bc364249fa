"""What a reader must know besides the table: where each stage came from, how each figure was taken, on what."""

import re
from collections.abc import Mapping
from typing import Any

from llmq.report import Report
from llmq.report.table import rows
from llmq.report.verdicts import sentence

HASH = re.compile(r"[0-9a-f]{64}")
Facts = dict[str, list[tuple[str, str]]]


def facts(report: Report) -> Facts:
    """Titled lists of (name, text)."""
    environment = report.environment
    machine = ("processor", "device", "threads", "dtype", "seed", "python", "llmq", "commit", "model_sha256")
    data = ", ".join(f"{k} sha256 {v[:12]}" for k, v in environment["data_sha256"].items())
    libraries = ", ".join(f"{k} {v}" for k, v in environment["libraries"].items() if v)
    gate = {"Gate": [(v["verdict"], sentence(v)) for v in report.gate["rules"]]} if report.gate else {}
    read = [line.partition(" ") for line in environment.get("reads", ())]
    what = {"What was read": [(name, text) for name, _, text in read]} if read else {}
    found = {
        "Stages": [(s["name"], _stage(s)) for s in report.stages],
        "How each figure was taken": [(f"{r.task} {r.metric}", r.convention) for r in rows(report)],
        "Machine": [*((k, str(environment.get(k))) for k in machine), ("data", data), ("libraries", libraries)],
    }
    return gate | what | found


def _stage(stage: Mapping[str, Any]) -> str:
    notes = {k: v for k, v in stage["notes"].items() if v not in (None, {}, [])}
    told = [f"{stage['seconds']:.1f} s", *(f"{k}: {_plain(v, k)}" for k, v in notes.items())]
    reused = stage.get("reused")
    return "; ".join(
        told + ([f"not measured anew but kept from an earlier run: {', '.join(reused)}"] if reused else [])
    )


def _plain(value: Any, key: str = "") -> str:
    if isinstance(value, Mapping):
        inner = {k: v for k, v in value.items() if not isinstance(v, list)}  # curves are drawn, not listed
        return ", ".join(
            f"{k} ({_plain(v, k)})" if isinstance(v, Mapping) else f"{k} {_plain(v, k)}" for k, v in inner.items()
        )
    return value[:12] if isinstance(value, str) and "sha256" in key and HASH.fullmatch(value) else str(value)
