"""Memory that this process gives back to the system at once: pages of files, and what was freed.

A file that was read through a mapping stays resident as long as the mapping lives, though its numbers were copied into
another layout long ago; and the allocator keeps what was freed below what is still in use.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PAGEOUT = 21
"""Linux's MADV_PAGEOUT: pages leave memory and are read again when they are asked for. Numbers are never lost."""
DONTNEED = 4
"""MADV_DONTNEED: pages leave this process, though other processes have the file mapped; what was written is lost."""


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library; None where it is not that of Linux."""
    found = ctypes.CDLL(None) if Path("/proc/self/maps").exists() else None
    return found if found is not None and hasattr(found, "malloc_trim") else None


def forget(tensors: Iterable[Tensor]) -> None:
    """Give back the pages of the files that tensors on the processor lie in."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of the tensor alone
            _advise(begin, tensor.data_ptr() + tensor.nbytes, PAGEOUT)


def forget_file(file: Path) -> None:
    """Give back what is resident of a file that is mapped to be read alone; it is read again where it is needed."""
    if _libc() is None:
        return
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        place, rights, *_, name = line.split(maxsplit=5) if line.count("/") else ("", "", "")
        if name == str(file.resolve()) and rights.startswith("r--"):  # so nothing was written
            begin, end = (int(part, 16) for part in place.split("-"))
            _advise(begin, end, DONTNEED)


def trim() -> None:
    """Give back what the allocator keeps of freed memory."""
    if libc := _libc():
        libc.malloc_trim(0)


def _advise(begin: int, end: int, how: int) -> None:
    libc, size = _libc(), (end - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if libc and size > 0:
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), how)
