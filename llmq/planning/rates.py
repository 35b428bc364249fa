"""The rates of this machine, each measured for a fraction of a second: products, reading, Python, trials."""

import time
from collections.abc import Callable, Iterable, Mapping

from llmq.sketch import Kind, Trial, Unit, Work

SECONDS = 2.0
"""The time of a calibration, shared out among the kinds of work."""
SIDE, ROWS = 1024, 512
LARGE = 2**23
"""Numbers of a tensor that no cache of a processor core holds."""
ITEMS = 2000
PYTHON = 3.0e6
"""Items that Python handled a second where the times that works state in seconds were taken."""
ALWAYS = ("copy", "python")


def measure(kinds: Iterable[Kind], device: str, seconds: float = SECONDS) -> dict[Kind, float]:
    """Operations, or bytes, a second for each kind of work: the mean, after one repetition that is not timed.

    A machine that others use as well gives a median of the moments in which nobody else had it.
    """
    wanted = sorted({*kinds, *ALWAYS}, key=str)
    return {kind: _rate(*_unit(kind, device), device, seconds / len(wanted)) for kind in wanted}


def seconds_of(work: Work, rates: Mapping[Kind, float]) -> float | None:
    """The time of a work at these rates; None if it is not known.

    Of a busy machine, or a slower one, all that is no trial takes longer, too, as much as Python does.
    """
    if work.unknown:
        return None
    return work.seconds * PYTHON / rates.get("python", PYTHON) + sum(
        count / rates[kind] for kind, count in work.operations.items()
    )


def _rate(run: Callable[[], object], count: float, device: str, seconds: float) -> float:
    from llmq.measure import synchronize

    run()
    synchronize(device)
    done, began = 0, time.perf_counter()
    while done < 3 or time.perf_counter() - began < seconds:
        run()
        synchronize(device)
        done += 1
    return done * count / (time.perf_counter() - began)


def _unit(kind: Kind, device: str) -> Unit:
    """The work that a kind stands for: a trial's own, or that of `float32`, `float32-vector`, `copy`, `python`."""
    import torch

    if isinstance(kind, Trial):
        return kind.unit(device)
    if kind == "python":
        return lambda: sorted({str(i): [i, i + 1] for i in range(ITEMS)}.items(), key=lambda item: item[1][0]), ITEMS
    if kind == "copy":
        one, other = (torch.ones(LARGE, device=device) for _ in range(2))
        return lambda: torch.mul(one, 1.5, out=other), 8.0 * LARGE
    dtype: torch.dtype = getattr(torch, kind.removesuffix("-vector"))
    rows, side = (1, 2 * SIDE) if kind.endswith("-vector") else (ROWS, SIDE)
    inputs, weight = (torch.randn(n, side, device=device).to(dtype) for n in (rows, side))
    work = rows * 2.0 * weight.numel() if rows > 1 else float(weight.nbytes)
    return lambda: torch.nn.functional.linear(inputs, weight), work
