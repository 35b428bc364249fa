"""Interleaved timing, peak memory and bytes: the instruments."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmq.statistics import quantile_stderr
from llmq.types import Clock, Measurement, Reading, Samples

SETTLE = 0.01
"""Seconds before a unit of work: the threads of one runtime spin on for milliseconds, and would slow another's."""
SHORT = 0.1
"""Seconds; shorter work is done once more before, not timed, so that it finds its own weights in the caches."""


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
        is_short = max(warm) < SHORT  # of all or of none, as they are compared
        taken: dict[str, list[float]] = {name: [] for name in names}
        for i in range(clocks[0].rounds):
            for name, clock in pairs if i % 2 == 0 else reversed(pairs):
                taken[name].append(_seconds(name, clock, device, is_short))
        for name, clock in pairs:
            measured[name] += [read(clock, r, taken[name]) for r in clock.readings]
    return measured


def _seconds(stage: str, clock: Clock, device: str, again: bool = False) -> float:
    try:
        return seconds_of(clock, device, again)
    except Exception as error:  # the caller is told which stage to go on without
        raise ClockFailed(stage) from error


def seconds_of(clock: Clock, device: str, again: bool = False) -> float:
    """The wall time of one unit of work, in seconds; `again`: of the second of two."""
    synchronize(device)
    time.sleep(SETTLE)
    if again:
        clock.run()
        synchronize(device)
    start = time.perf_counter()
    clock.run()
    synchronize(device)
    return time.perf_counter() - start


def read(clock: Clock, reading: Reading, seconds: Sequence[float]) -> Measurement:
    """The quantile over the rounds, with its standard error."""
    values = tuple(reading.of_seconds(s) for s in seconds)
    samples = Samples(values, statistic="quantile", quantile=reading.quantile)
    value, stderr = quantile_stderr(values, reading.quantile)
    return Measurement(
        clock.task,
        reading.metric,
        value,
        reading.unit,
        reading.better,
        len(values),
        stderr,
        # The rule, not whether the work was short: a protocol says nothing of what came out.
        f"{clock.convention}; {_rank(reading.quantile)} of rounds taken in turn with every other stage, where work "
        f"takes under {SHORT:g} s each after one that is not timed",
        samples,
    )


def _rank(quantile: float) -> str:
    return "median" if quantile == 0.5 else f"{quantile:.0%} quantile"


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        import torch

        torch.accelerator.synchronize()


def release_memory(device: str) -> None:
    """Give what Python and the allocators hold but do not use back to the system."""
    gc.collect()
    trim(device)


def trim(device: str) -> None:
    """Give what the allocators hold but do not use back to the system."""
    import ctypes
    import platform

    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, Any]]:
    """Yields a dict that holds `bytes` and the `convention` once the block has ended."""
    peak: dict[str, Any] = {}
    if device.startswith("cuda"):
        import torch

        release_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.update(bytes=torch.cuda.max_memory_allocated(device), convention="peak bytes allocated on the device")
        return
    reset = Path("/proc/self/clear_refs")
    fresh = reset.exists()
    if fresh:
        release_memory(device)
        reset.write_text("5", encoding="utf-8")  # resets VmHWM: proc(5)
    yield peak
    peak.update(
        bytes=_high_water_mark(),
        convention="peak resident memory of the whole process"
        + (", libraries included" if fresh else " since its start"),
    )


def _high_water_mark() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)
