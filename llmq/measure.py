"""Instruments: interleaved timing and peak memory."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from llmq.environment import release_memory
from llmq.statistics.figures import quantile_stderr
from llmq.types import Clock, Measurement, Reading, Samples

SETTLE = 0.01
"""Seconds of rest before a unit of work: threads of one runtime spin on for milliseconds, and would slow the next."""
VISITS = 8
"""The times that each stage is opened where memory has no room for all stages at once: rounds of one visit share the
state of the machine, and fewer than eight visits decide nothing (`statistics.estimates.FEWEST`)."""
SHORT = 0.1
"""Seconds; shorter work runs once untimed before each timing, so that the caches hold the weights."""
# The rule and not its outcome: a protocol must not depend on the times.
IN_TURN = (
    f"rounds taken in turn with every other stage, where work takes under {SHORT:g} s each after one that is not timed"
)
IN_VISITS = f"rounds taken in {VISITS} visits to every stage, open alone, visits resampled whole"


class ClockFailed(Exception):
    """The work of one stage's clock failed, by the error that caused this one."""

    def __init__(self, stage: str):
        super().__init__(stage)
        self.stage = stage


def interleave(stages: Mapping[str, Sequence[Clock]], device: str) -> dict[str, list[Measurement]]:
    """Time the clocks of all stages in turn, so that a drifting machine moves them all alike.

    Every round visits every stage once, alternately forwards and backwards; the i-th sample of one stage and the i-th
    of another were taken moments apart and can be compared in pairs. Raises `ClockFailed` for the stage whose work
    fails.
    """
    measured: dict[str, list[Measurement]] = {name: [] for name in stages}
    names = list(stages)
    for clocks in zip(*stages.values(), strict=True):
        pairs = list(zip(names, clocks, strict=True))
        warm = [min((_seconds(n, c, device) for _ in range(c.warmup)), default=SHORT) for n, c in pairs]
        is_short = max(warm) < SHORT  # decided for all stages together, as they are compared
        taken: dict[str, list[float]] = {name: [] for name in names}
        for i in range(clocks[0].rounds):
            for name, clock in pairs if i % 2 == 0 else reversed(pairs):
                taken[name].append(_seconds(name, clock, device, is_short))
        for name, clock in pairs:
            measured[name] += [read(clock, r, taken[name]) for r in clock.readings]
    return measured


Opening = Callable[[], AbstractContextManager[Sequence[Clock]]]
"""Opens a stage and gives its clocks, which hold as long as the block."""
_Timed = tuple[Clock, list[float]]
"""A clock and its seconds."""


def in_visits(stages: Mapping[str, Opening], device: str) -> dict[str, list[Measurement]]:
    """Time the clocks of stages that memory has no room for at once: one stage is open at a time.

    Each stage is visited `VISITS` times, alternately forwards and backwards, and takes its share of the rounds each
    time; clocks of fewer rounds are visited as often as they have rounds. Samples of the same number are minutes
    apart, so their pairs bear the drift of a machine between visits: the samples of one visit are a cluster.
    Raises `ClockFailed` for the stage that fails.
    """
    visited: dict[str, list[list[_Timed]]] = {name: [] for name in stages}
    for visit in range(VISITS):
        for name in list(stages)[:: 1 if visit % 2 == 0 else -1]:
            if visit and all(visit >= clock.rounds for clock, _ in visited[name][0]):
                continue
            try:
                visited[name].append(_visit(stages[name], visit, device))
            except Exception as error:
                raise ClockFailed(name) from error
    return {name: list(_of_visits(visits)) for name, visits in visited.items()}


def _visit(opening: Opening, visit: int, device: str) -> list[_Timed]:
    """Each clock of a stage with its seconds in one visit; the clocks no longer hold the stage."""
    with opening() as clocks:
        timed = [(replace(clock, run=_over), _share(clock, visit, device)) for clock in clocks]
        del clocks  # or the stage would outlive the block
    return timed


def _of_visits(visits: Sequence[list[_Timed]]) -> Iterator[Measurement]:
    for of_clock in zip(*visits, strict=True):
        clock = of_clock[0][0]
        seconds = [s for _, shared in of_clock for s in shared]
        numbers = tuple(i for i, (_, shared) in enumerate(of_clock) for _ in shared)
        yield from (read(clock, reading, seconds, IN_VISITS, numbers) for reading in clock.readings)


def _share(clock: Clock, visit: int, device: str) -> list[float]:
    """The seconds of the rounds of one visit, after the warm-up."""
    visits = min(VISITS, clock.rounds)
    if visit >= visits:
        return []
    for _ in range(max(1, clock.warmup)):
        seconds_of(clock, device)
    first, after = (clock.rounds * n // visits for n in (visit, visit + 1))
    return [seconds_of(clock, device) for _ in range(first, after)]


def _over() -> None:
    raise RuntimeError("the stage of this clock is closed")


def _seconds(stage: str, clock: Clock, device: str, again: bool = False) -> float:
    try:
        return seconds_of(clock, device, again)
    except Exception as error:  # the caller is told which stage to go on without
        raise ClockFailed(stage) from error


def seconds_of(clock: Clock, device: str, again: bool = False) -> float:
    """The wall time of one unit of work, in seconds; with `again`, of the second of two."""
    synchronize(device)
    time.sleep(SETTLE)
    if again:
        clock.run()
        synchronize(device)
    start = time.perf_counter()
    clock.run()
    synchronize(device)
    return time.perf_counter() - start


def read(
    clock: Clock,
    reading: Reading,
    seconds: Sequence[float],
    turns: str = IN_TURN,
    visits: tuple[int, ...] | None = None,
) -> Measurement:
    """The quantile over the rounds, with the standard error; `turns` says how the rounds were taken.

    `visits` numbers the visit of each round, where rounds of one visit are alike.
    """
    values = tuple(reading.of_seconds(s) for s in seconds)
    samples = Samples(values, statistic="quantile", quantile=reading.quantile, clusters=visits)
    value, stderr = quantile_stderr(values, reading.quantile, visits)
    return Measurement(
        clock.task,
        reading.metric,
        value,
        reading.unit,
        reading.better,
        len(values),
        stderr,
        f"{clock.convention}; {_rank(reading.quantile)} of {turns}",
        samples,
    )


def _rank(quantile: float) -> str:
    return "median" if quantile == 0.5 else f"{quantile:.0%} quantile"


def synchronize(device: str) -> None:
    """Wait until the device has finished all work."""
    if device != "cpu":
        import torch

        torch.accelerator.synchronize(torch.device(device))


@dataclass
class Peak:
    """The most memory of a block of work, known once the block has ended."""

    bytes: int = 0
    convention: str = ""
    alone: str = ""
    """The convention of the bytes above those of the process without a model."""


_measured: list[Peak] = []
"""The blocks that are being measured; one within another resets the counter of both."""


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Measure the peak memory of a block, which may hold other measured blocks."""
    peak = Peak()
    for outer in _measured:
        outer.bytes = max(outer.bytes, _most(device))
    resets = _reset(device)
    _measured.append(peak)
    try:
        yield peak
    finally:
        _measured.remove(peak)
        peak.bytes = max(peak.bytes, _most(device))
    if device.startswith("cuda"):
        peak.convention = "peak bytes allocated on the device"
        peak.alone = f"{peak.convention}, above those without a model"
        return
    since = "" if resets else " since its start"
    peak.convention = f"peak resident memory of the whole process{since or ', libraries included'}"
    peak.alone = f"peak resident memory{since} above the process with its libraries loaded and no model"


def _reset(device: str) -> bool:
    """Give unused memory back and let the counter of the peak begin anew; False where it cannot."""
    release_memory(device)
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5", encoding="utf-8")  # resets VmHWM: proc(5)
    return counter.exists()


def _most(device: str) -> int:
    """The peak since the counter was reset."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resident("VmHWM")


def memory_now(device: str) -> int:
    """The bytes in use, once unused ones were given back: those that `peak_memory` counts."""
    release_memory(device)
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_allocated(device))
    return resident("VmRSS")


def resident(name: str) -> int:
    """The resident bytes of this process now (`VmRSS`), or the most since they were reset (`VmHWM`)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)
