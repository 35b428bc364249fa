"""What a figure depends on besides the model: versions, commit, processor, device, threads."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmq
from llmq import trust

if TYPE_CHECKING:
    from llmq.types import Loaded

LIBRARIES = (
    *(
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "peft",
        "bitsandbytes",
        "accelerate",
        "datasets",
        "lm-eval",
    ),
    *(
        "numpy",
        "scipy",
        "torchvision",
        "timm",
        "torchmetrics",
        "faster-coco-eval",
        "torch-pruning",
        "scikit-learn",
        "openvino",
    ),
    "nncf",
)


def describe(device: str, seed: int) -> dict[str, Any]:
    """The environment as the report records it."""
    import torch

    return {
        "llmq": llmq.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "processor": processor(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "trusted": trust.told(),
    }


def where_it_runs(loaded: "Loaded") -> str:
    """The threads, device, runtime and precision of an opened stage, as the protocol of its times says them.

    The precision is that of what is computed in floats: an int8 graph and a packed layer have such parts too.
    """
    import torch

    floats = (p.dtype for p in loaded.module.parameters() if p.is_floating_point())
    precision = getattr(loaded.module, "precision", None) or str(next(floats, torch.float32)).removeprefix("torch.")
    return f"{torch.get_num_threads()} threads, {loaded.device}, {loaded.artifact.runtime} in {precision}"


def library_version(name: str) -> str | None:
    """The installed version of a distribution, or `None`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of this checkout of llmq, marked if it was changed; `None` when installed from a wheel."""
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


def resolve_device(device: str) -> str:
    """`auto` is the first accelerator if there is one, else the processor."""
    import torch

    from llmq.errors import UserError

    if device == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown, or not on this machine
        raise UserError(f"device {device!r} is not on this machine; 'auto' and 'cpu' are") from None
    return device


def prepare(device: str, seed: int, threads: int | None) -> str:
    """Set seed, threads and allocator for a run, and quieten libraries; returns the device."""
    import logging
    import sys
    import warnings

    # Libraries draw bars of their own, with tqdm; where nobody watches they would fill the log.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")

    import torch
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to one another
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # LLM.int8 on a processor logs one line a layer and forward; the 4-bit backend one at import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return resolve_device(device)


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of returning each to the kernel at once.

    Every activation over 32 MB is otherwise mapped, zeroed page by page and unmapped at each use: a third of the time
    of a training step on a processor (`scripts/bench_finetune`).
    """
    import ctypes

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of <malloc.h>
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
