"""Several processes for one run (torchrun, accelerate launch): all of them train, the first does everything else."""

import ctypes
import os
import signal
import sys
from datetime import timedelta

PATIENCE = timedelta(days=2)
"""How long the others wait while the first converts, quantizes or evaluates."""


def count() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def wait(device: str) -> None:
    """Until all processes have come here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=PATIENCE).wait_for_everyone()


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
