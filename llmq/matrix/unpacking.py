"""Unpacking in one pass, by a function in C that is compiled once on a machine with a C compiler.

PyTorch has no such operation, and six of its own take three to ten times as long: the layers of a prompt of 256 tokens
then wait for them a third of their time. Without a compiler they do the work, to the same bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llmq import files

SOURCE = Path(__file__).with_name("unpack.c")
# A product and a sum that are rounded once, as one operation, would give other bits.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")
Unpack = Callable[[Tensor, Tensor | None, Tensor, Tensor, int], None]
"""(packed, upper 4 bits or None, scales and shifts, weight, group size): fills the weight `[inputs, outputs]`."""


@cache
def compiled() -> Unpack | None:
    """The function in C; None where it cannot be compiled or loaded."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        return None
    digest = hashlib.sha256(SOURCE.read_bytes() + _processor() + compiler.encode()).hexdigest()
    try:
        folder = files.make_whole(files.cache("compiled", digest[:24]), lambda f: _compile(compiler, f), shared=True)
        function = ctypes.CDLL(str(folder / "unpack.so")).unpack
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    function.restype, function.argtypes = None, [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3

    def unpack(packed: Tensor, high: Tensor | None, scales: Tensor, weight: Tensor, group: int) -> None:
        upper = None if high is None else high.data_ptr()
        function(packed.data_ptr(), upper, scales.data_ptr(), weight.data_ptr(), *weight.shape, group)

    return unpack


def _compile(compiler: str, folder: Path) -> None:
    made, linked = str(folder / "unpack.o"), str(folder / "unpack.so")
    quiet = {"check": True, "capture_output": True, "timeout": 60}
    subprocess.run([compiler, *FLAGS, "-c", str(SOURCE), "-o", made], **quiet)  # type: ignore[call-overload]
    # Linked without OpenMP: PyTorch's own is there, and a second one would have threads of its own.
    subprocess.run([compiler, "-shared", made, "-o", linked, "-lm"], **quiet)  # type: ignore[call-overload]


def _processor() -> bytes:
    """What tells one kind of processor from another: the code is compiled for this one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([*told, torch.backends.cpu.get_cpu_capability()]).encode()
