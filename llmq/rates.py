"""The rates of this machine, each measured for a fraction of a second: products, reading, elementwise work."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from llmq.sketch import Work

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SECONDS = 2.0
"""The time of a calibration, shared out among the kinds of work."""
SIDE, ROWS, CHANNELS, PIXELS = 1024, 512, 32, 48
LARGE = 2**23
"""Numbers of a tensor that no cache of a processor core holds."""
ALWAYS = ("copy",)

Unit = tuple[Callable[[], object], float]
"""A unit of work, and its operations or bytes."""


def measure(kinds: Iterable[str], device: str, seconds: float = SECONDS) -> dict[str, float]:
    """Operations, or bytes, a second for each kind of work: the mean, after one repetition that is not timed.

    A machine that others use as well gives a median of the moments in which nobody else had it.
    """
    wanted = sorted({*kinds, *ALWAYS})
    return {kind: _rate(*_unit(kind, device), device, seconds / len(wanted)) for kind in wanted}


def seconds_of(work: Work, rates: Mapping[str, float]) -> float | None:
    """The time of a work at these rates; None if it is not known."""
    if work.unknown:
        return None
    return work.seconds + sum(count / rates[kind] for kind, count in work.operations.items())


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


def _unit(kind: str, device: str) -> Unit:
    """The work that a kind stands for: `float32`, `float32-vector`, `conv-float32`, `copy`."""
    import torch

    if kind == "copy":
        one, other = (torch.ones(LARGE, device=device) for _ in range(2))
        return lambda: torch.mul(one, 1.5, out=other), 8.0 * LARGE
    name = kind.removeprefix("conv-").removesuffix("-vector")
    dtype: torch.dtype = getattr(torch, name)
    if kind.startswith("conv-"):
        return _convolution(dtype, device)
    rows, side = (1, 2 * SIDE) if kind.endswith("-vector") else (ROWS, SIDE)
    inputs, weight = (torch.randn(n, side, device=device).to(dtype) for n in (rows, side))
    work = rows * 2.0 * weight.numel() if rows > 1 else float(weight.nbytes)
    return lambda: torch.nn.functional.linear(inputs, weight), work


def _convolution(dtype: "torch.dtype", device: str) -> Unit:
    import torch

    order = torch.channels_last
    shape = 4, CHANNELS, PIXELS, PIXELS
    images: Tensor = torch.randn(shape, device=device).to(dtype, memory_format=order)
    layer = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, device=device).to(dtype, memory_format=order)  # type: ignore[call-overload]
    count = 2.0 * layer.weight.numel() * 4 * PIXELS * PIXELS

    def run() -> None:
        with torch.no_grad():
            layer(images)

    return run, count
