"""The growth of a process whose heap has holes while layers are packed by way of copies; run by test_memory.py."""

import ctypes
import json
import random
from contextlib import ExitStack
from typing import Any

from llmq import environment, measure

MB = 2**20


def touched(glibc: Any, size: int) -> int:
    place = glibc.malloc(size)
    ctypes.memset(place, 1, size)
    return int(place)


def packed(glibc: Any) -> int:
    """Layers of three sizes, each packed by way of four copies, all freed but the small results, whose bytes count."""
    kept = 0
    for i in range(140):
        size = (3 * MB + MB // 2, MB + MB // 3, MB // 2)[i % 7 % 3]
        copies = [touched(glibc, size) for _ in range(4)]
        touched(glibc, size // 8)
        kept += size // 8
        for copy in copies:
            glibc.free(ctypes.c_void_p(copy))
    return kept


def main() -> None:
    glibc: Any = ctypes.CDLL(None)
    glibc.malloc.restype = ctypes.c_void_p
    glibc.mallopt(environment.M_MMAP_MAX, 0)
    glibc.mallopt(environment.M_TRIM_THRESHOLD, 2**31 - 1)
    draw = random.Random(0)
    blocks = [(touched(glibc, int(MB * 10 ** draw.uniform(-1, 1))), glibc.malloc(10_000)) for _ in range(64)]
    for hole, _ in blocks:  # each lies behind a block that stays
        glibc.free(ctypes.c_void_p(hole))
    told = {}
    for name in ("as it is", "apart"):
        with ExitStack() as stack:
            if name == "apart":
                stack.enter_context(environment.without_holes())
                stack.enter_context(environment.large_blocks_apart(environment.MEDIUM))
            glibc.malloc_trim(0)
            before = measure.resident("VmRSS")
            told["kept"] = packed(glibc)
            told[name] = measure.resident("VmRSS") - before
    print(json.dumps(told))


main()
