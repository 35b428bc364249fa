"""Several processes for one run (torchrun, accelerate launch): all train and evaluate, the first does all else."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from llmq.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=2)
"""The longest wait of other processes while the first converts, quantizes or evaluates."""


def count() -> int:
    """The number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check(shares: bool) -> None:
    """Raise `UserError` where several processes were asked for, and one alone would do all the work.

    On processors `accelerate launch` starts one without a message; an address to meet at is all that tells. Of several
    that were started the first does all unless a step or a task `shares` its work.
    """
    if count() > 1 and not shares:
        raise UserError(
            f"{count()} processes were started, and no step and no task here shares its work among them (adapt.lora, "
            "adapt.full, adapt.scales, calibrations of text, and all tasks but size and speed do); start one process"
        )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does on processors; "
            "torchrun --nproc_per_node N -m llmq run … starts them"
        )


def check_alone(what: str) -> None:
    """Raise `UserError` where several processes were started for what makes run after run, each led by the first."""
    if count() > 1:
        raise UserError(f"{count()} processes were started, and {what} is made by one; start one process")


def sharding() -> str:
    """The engine by which accelerate's configuration shares weights out among processes, or an empty string."""
    return next((e for e in ("fsdp", "deepspeed") if os.environ.get(f"ACCELERATE_USE_{e.upper()}") == "true"), "")


def here() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def number() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """True in the process that writes and speaks."""
    return number() == 0


def join(device: str) -> "PartialState":
    """Join the processes, at the first call."""
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu", timeout=PATIENCE)


def wait(device: str) -> None:
    """Wait until every process has come here."""
    if count() > 1:
        join(device).wait_for_everyone()


@contextmanager
def first_does(device: str) -> Iterator[None]:
    """Run the block in the first process while the others wait, then in the others.

    The block fills a cache or a folder, for example; the others find it filled.
    """
    if not is_first():
        wait(device)
    yield
    if is_first():
        wait(device)


def end_with_parent() -> None:
    """Make Linux kill this process when its parent ends, for whatever reason."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
