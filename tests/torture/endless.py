"""All kinds of faults, each from a seed of its own, counted; see `scripts/torture`."""

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("recipes", "checkpoints", "data_files", "run_folders", "faults", "starved", "kills")
SHARES = {
    "recipes": 20, "checkpoints": 5, "data_files": 20, "run_folders": 5, "faults": 2, "starved": 1, "kills": 1
}  # fmt: skip
"""Cases of each kind in a round."""
LONGEST = 20
"""Letters of an end that is counted by its own word."""


@dataclass
class Seen:
    """What became of the cases of one kind."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """How many there were."""
        return self.ends.total() + len(self.faults)

    def told(self, kind: str) -> str:
        """A line for a person."""
        rate = f"{3600 * self.cases / self.seconds:,.0f} an hour" if self.seconds else ""
        ends = ", ".join(f"{word}: {n}" for word, n in sorted(self.ends.items()))
        return f"{kind}: {self.cases} cases, {len(self.faults)} faults, {rate} ({ends})"


def once_of(kind: str) -> Any:
    """The function that makes one case of a kind; None where there is none."""
    if importlib.util.find_spec(f"torture.{kind}") is None:
        return None
    module: Any = importlib.import_module(f"torture.{kind}")
    if hasattr(module, "warm"):
        module.warm()
    return getattr(module, "once", None) or getattr(module, "kill_once", None)


def some(kind: str, seed: int, cases: int, seconds: float = float("inf")) -> Seen:
    """Cases of a kind from a seed on, each in a folder of its own."""
    seen, once, began = Seen(), once_of(kind), time.perf_counter()
    for number in range(seed, seed + cases if once else seed):
        if time.perf_counter() - began > seconds:
            break
        folder = Path(tempfile.mkdtemp(prefix=f"llmq-{kind}-"))
        try:
            seen.ends[str(once(number, folder))] += 1
        except AssertionError as error:
            seen.faults.append(str(error))
            print(f"{kind}: {error}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    seen.seconds = time.perf_counter() - began
    return seen


def main(minutes: float, seed: int) -> int:
    """Rounds of all kinds until the time is over; 1 if anything was at fault."""
    print(f"torture: seed {seed}, {minutes:g} minutes; go on with: scripts/torture --seed {seed}", flush=True)
    ends = time.monotonic() + 60 * minutes
    totals = {kind: Seen() for kind in KINDS}
    number = seed
    while time.monotonic() < ends:
        for kind, share in SHARES.items():
            # A process for each kind: recipes need no torch, and a child of a small process is made at once.
            for line in _apart(kind, number * share, share, ends):
                _count(totals[kind], line)
        number += 1
        print(f"torture: round {number - seed}, {sum(len(s.faults) for s in totals.values())} faults", flush=True)
    for kind, seen in totals.items():
        if seen.cases:
            print(seen.told(kind))
    return int(any(seen.faults for seen in totals.values()))


_servers: dict[str, tuple[Any, Any]] = {}


def _apart(kind: str, seed: int, cases: int, ends: float) -> list[tuple[float, str, str]]:
    """(seconds, word, fault) of each case, made by the warmed process of that kind."""
    if kind not in _servers:
        _servers[kind] = _serve(kind)
    ask, answers = _servers[kind]
    found = []
    for number in range(seed, seed + cases):
        if time.monotonic() > ends:
            break
        ask.write(f"{number}\n")
        ask.flush()
        line = answers.readline()
        if not line:
            raise SystemExit(f"torture: the process of {kind} ended at seed {number}")
        seconds, word, fault = line.rstrip("\n").split("\t", 2)
        if word == "none":
            break
        found.append((float(seconds), word, fault.replace("\v", "\n")))
    return found


def _serve(kind: str) -> tuple[Any, Any]:
    """A child that makes a case for each seed that it reads."""
    (asked, ask), (answers, answer) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(ask)
        os.close(answers)
        once = None
        with os.fdopen(asked) as seeds, os.fdopen(answer, "w") as out:
            for line in seeds:
                once = once or once_of(kind)
                began, word, fault = time.perf_counter(), "none", ""
                if once:
                    folder = Path(tempfile.mkdtemp(prefix=f"llmq-{kind}-"))
                    try:
                        word = str(once(int(line), folder))
                    except AssertionError as error:
                        word, fault = "fault", f"{kind} {line.strip()}: {error}"
                    shutil.rmtree(folder, ignore_errors=True)
                fault = fault.replace("\n", "\v").replace("\t", " ")
                out.write(f"{time.perf_counter() - began}\t{word}\t{fault}\n")
                out.flush()
        sys.exit()
    os.close(asked)
    os.close(answer)
    return os.fdopen(ask, "w"), os.fdopen(answers)


def _count(seen: Seen, case: tuple[float, str, str]) -> None:
    seconds, word, fault = case
    seen.seconds += seconds
    if fault:
        seen.faults.append(fault)
        print(fault, flush=True)
    else:
        seen.ends[word if len(word) < LONGEST else "borne"] += 1  # kills tell a whole story each
