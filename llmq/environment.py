"""The surroundings that a figure depends on: versions, commit, processor, device, threads, memory."""

import ctypes
import gc
import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmq
from llmq import trust
from llmq.errors import UserError
from llmq.matrix import products

if TYPE_CHECKING:
    from llmq.types import Loaded

LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "peft", "bitsandbytes", "accelerate", "datasets", "lm-eval",
    "numpy", "scipy", "torchvision", "timm", "torchmetrics", "faster-coco-eval", "torch-pruning", "scikit-learn",
    "openvino", "nncf", "openvino-genai", "openvino-tokenizers", "onnx", "onnxruntime", "gptqmodel",
    "pillow", "scikit-image", "jinja2", "sacrebleu", "evaluate", "rouge-score", "nltk", "sympy",
)  # fmt: skip

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""The settings of glibc's allocator, from <malloc.h>."""
LARGE, MAPS = 2**25, 2**16
"""The bytes from which blocks are mapped one by one, the most that glibc can be told; and the most maps at once."""
MEDIUM = 2**20
"""The bytes from which a hole of the heap is taken out of use, and blocks are mapped while weights are packed."""
_mapped: list[int] = []
"""The bytes from which blocks are mapped, for each block of work that says so, the innermost last."""
_maps_outside = [MAPS]
"""The most maps outside of such work: glibc's own number, until `prepare` has it map nothing."""
_threads: list[tuple[int, int]] = []
"""The threads of PyTorch before a call asked for others, and those that it asked for; empty where none did."""
_set_aside = [0]
"""How many blocks of work are under way for which all objects were set aside; Python would count the objects."""


def describe(device: str, seed: int) -> dict[str, object]:
    """The environment as the report records it."""
    import torch

    return {
        "llmq": llmq.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "processor": processor(device),
        "bfloat16_products": bfloat16_products(device),
        "device": device,
        "accelerator": accelerator(device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "trusted": trust.told(),
    }


def where_it_runs(loaded: "Loaded") -> str:
    """The threads, device, runtime and precision of an opened stage, for the protocol of times.

    The precision is that of the float parts, which int8 graphs and packed layers have as well.
    """
    import torch

    floats = (p.dtype for p in loaded.module.parameters() if p.is_floating_point())
    precision = getattr(loaded.module, "precision", None) or str(next(floats, torch.float32)).removeprefix("torch.")
    runs_in = loaded.artifact.model.runs_in(loaded) or f"{loaded.artifact.runtime} in {precision}"
    return f"{torch.get_num_threads()} threads, {loaded.device}, {runs_in}"


@cache
def library_version(name: str) -> str | None:
    """The installed version of a distribution, or `None`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The git commit of this checkout of llmq, marked for uncommitted changes; `None` when installed from a wheel."""
    root = Path(llmq.__file__).parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "") or None


def processor(device: str) -> str:
    """The name of the processor or accelerator that does the work."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{named} ({torch.backends.cpu.get_cpu_capability()})"


def bfloat16_products(device: str) -> str:
    """How matrices of bfloat16 are multiplied here, in words."""
    emulated = device == "cpu" and products.lacks_bfloat16()
    return "in float32, as the processor lacks bfloat16" if emulated else "in bfloat16"


def accelerator(device: str) -> dict[str, object] | None:
    """What decides a figure of a card besides its name: driver, CUDA, cuDNN, precision of products; None without one.

    Products of float32 are summed as the card sums them, so the same bytes twice are a promise of processors alone.
    """
    if not device.startswith("cuda"):
        return None
    import torch

    return {
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "float32_products": float32_products(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def float32_products() -> str:
    """The precision of products of float32 on cards: "ieee" is whole float32, "tf32" 10 bits of each factor."""
    import torch

    backends: Any = torch.backends
    return str(backends.fp32_precision)


def set_float32_products(precision: str) -> None:
    """Set the precision of products of float32 on cards."""
    import torch

    backends: Any = torch.backends
    backends.fp32_precision = precision


@cache
def _driver() -> str | None:
    """The version of the driver of NVIDIA's cards, or None."""
    file = Path("/sys/module/nvidia/version")
    if file.exists():
        return file.read_text(encoding="utf-8").strip()
    if not (tool := shutil.which("nvidia-smi")):  # as under WSL2
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return told[0] if told else None


def free_memory(device: str) -> int:
    """The bytes that a model can have: of a card those free and those that its allocator keeps unused.

    Of a processor those free now, with those of this process, below the limit of a container.
    """
    if device.startswith("cuda"):
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    import psutil

    own = int(psutil.Process().memory_info().rss)
    there = int(psutil.virtual_memory().available) + own
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(there, int(said)) if said.isdigit() else there


@contextmanager
def forked_random(device: str) -> Iterator[None]:
    """Give the random numbers of the processor and of this one device back as they were, after the block."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        yield


def resolve_device(device: str) -> str:
    """The device; `auto` is the first accelerator, or else the processor. Raises `UserError` for a missing one."""
    import torch

    if device == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):  # unknown, or not on this machine
        found = None
    if found is None or found.is_meta:  # which has no memory
        raise UserError(f"device {device!r} is not on this machine; 'auto' and 'cpu' are") from None
    return "cpu" if found.is_cpu else device  # "cpu:1" is the processor, too


def own_device(device: str) -> str:
    """What the device of the first process is for this one: each process has a card of its own."""
    return resolve_device("auto" if device.startswith("cuda") else device)


def quieten() -> None:
    """Keep libraries that are imported from now on from drawing progress bars into a log."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def prepare(device: str, seed: int, threads: int | None) -> str:
    """Set seed, threads and allocator for a run, and quieten libraries; returns the device."""
    quieten()
    import torch
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to one another
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # LLM.int8 on a processor logs one line a layer and forward; the 4-bit backend one at import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if glibc := _glibc():
        # Have glibc keep large freed blocks instead of returning each to the kernel at once. Every activation over
        # 32 MB is otherwise mapped, zeroed page by page and unmapped at each use: a third of the time of a training
        # step on a processor (`scripts/bench_finetune`).
        _maps_outside[0] = 0
        _settle()
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    products.widen()
    _take_threads(threads)
    torch.manual_seed(seed)
    found = resolve_device(device)
    if found.startswith("cuda"):
        _take_card(found)
    return found


def _take_threads(threads: int | None) -> None:
    """Have PyTorch work on this many threads; without a number on as many as before an earlier call asked for some."""
    import torch

    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UserError(f"threads {threads!r}: a whole number above 0, or none for as many as there are")
    before, asked = _threads.pop() if _threads else (0, 0)
    if asked == torch.get_num_threads():
        torch.set_num_threads(before)
    if threads:
        _threads.append((torch.get_num_threads(), threads))
        torch.set_num_threads(threads)


def _take_card(device: str) -> None:
    """Make a card the one that libraries take where they name none, with products of float32 in whole float32."""
    import torch

    place = torch.device(device)
    torch.cuda.set_device(place.index or 0)
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{place.index or 0}"  # or Trainer takes the first card
    set_float32_products("ieee")  # convolutions would round their factors to 10 bits (TF32)


@contextmanager
def large_blocks_apart(least: int = LARGE) -> Iterator[None]:
    """Let blocks of `least` bytes be mapped one by one, as glibc does by itself, and be gone once they are freed.

    Tasks have few of them, such as the logits of a batch; in the heap each may lie beyond the holes that others left.
    """
    _mapped.append(least)
    _settle()
    try:
        yield
    finally:
        _mapped.pop()
        _settle()


def _settle() -> None:
    """Tell glibc which blocks are mapped."""
    if glibc := _glibc():
        if _mapped:
            glibc.mallopt(M_MMAP_THRESHOLD, _mapped[-1])
        glibc.mallopt(M_MMAP_MAX, MAPS if _mapped else _maps_outside[0])


@contextmanager
def without_holes() -> Iterator[None]:
    """Keep the holes that earlier work left in the heap out of use for a block of work.

    Their pages went back to the system. Blocks that are laid into them, each into another, touch them all again: a step
    whose blocks are freed at once would grow by what the work before it needed.
    """
    glibc = _glibc()
    holes = list(_holes(glibc)) if glibc else []
    try:
        yield
    finally:
        for hole in holes:
            glibc.free(ctypes.c_void_p(hole))


def _glibc() -> Any:
    """The C library of this process; None where it is another."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _holes(glibc: ctypes.CDLL) -> Iterator[int]:
    """Take the holes of the heap one by one and touch none of them; what fits in none is mapped, or lies beyond."""
    glibc.malloc_trim(0)
    glibc.malloc.restype = ctypes.c_void_p
    begin, end = _heap()
    size = 2 ** (end - begin).bit_length()
    with large_blocks_apart():
        while size >= MEDIUM:
            place = glibc.malloc(ctypes.c_size_t(size))
            if place and begin <= place < end:
                yield place
            else:
                glibc.free(ctypes.c_void_p(place))
                size //= 2
    glibc.malloc_trim(0)


def _heap() -> tuple[int, int]:
    """The first address of the heap and the one after it; zeros where the system does not tell."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    spans = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")] or [["0", "0"]]
    return int(spans[0][0], 16), int(spans[-1][1], 16)


@contextmanager
def set_aside() -> Iterator[None]:
    """Keep all objects that are there now out of garbage collection for a block of work; no model may be open.

    Libraries hold two million objects. Each model that is freed would have them looked through, a third of a second.
    """
    gc.freeze()
    _set_aside[0] += 1
    try:
        yield
    finally:
        _set_aside[0] -= 1
        if not _set_aside[0]:
            gc.unfreeze()


def release_memory(device: str) -> None:
    """Collect garbage, and return unused memory of the allocators to the system."""
    gc.collect()
    trim(device)


def trim(device: str) -> None:
    """Return unused memory of the allocators to the system."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    if glibc := _glibc():
        glibc.malloc_trim(0)
