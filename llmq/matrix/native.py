"""Functions in C that are compiled once, for the processor of this machine, where there is a C compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llmq import files

# A product and a sum that are rounded once, as one operation, would give other bits.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `name`.c beside this file; None where they cannot be compiled or loaded."""
    compiler = shlex.split(os.environ.get("CC") or shutil.which("cc") or "")  # CC may have arguments: gcc -m64
    source = Path(__file__).with_name(f"{name}.c")
    if not compiler:
        return None
    digest = hashlib.sha256(source.read_bytes() + _processor() + repr([compiler, FLAGS]).encode()).hexdigest()
    place = files.cache("compiled", digest[:24])
    with suppress(OSError, subprocess.SubprocessError):
        files.make_whole(place, lambda folder: _compile(compiler, source, folder), shared=True)
        return ctypes.CDLL(str(place / f"{name}.so"))
    with suppress(OSError, subprocess.SubprocessError), TemporaryDirectory() as folder:  # a cache that nobody may write
        _compile(compiler, source, Path(folder))
        return ctypes.CDLL(str(Path(folder) / f"{name}.so"))
    return None


def _compile(compiler: list[str], source: Path, folder: Path) -> None:
    made, linked = (str(folder / f"{source.stem}.{ending}") for ending in ("o", "so"))
    # Linked without OpenMP: PyTorch's own is there, and a second one would have threads of its own.
    for command in (
        [*compiler, *FLAGS, "-c", str(source), "-o", made],
        [*compiler, "-shared", made, "-o", linked, "-lm"],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def _processor() -> bytes:
    """What tells one kind of processor from another: the code is compiled for this one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([*told, torch.backends.cpu.get_cpu_capability()]).encode()
