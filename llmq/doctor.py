"""The state of this machine: versions, processor, memory, disk, accelerator, and the words that can run here."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llmq
from llmq import environment, plugin
from llmq.errors import free_bytes, in_bytes
from llmq.files import cache

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Features of processors that decide the speed: products in bfloat16 and of int8."""
NEEDS = {
    "vision": (
        "timm",
        "torchvision",
        "torchmetrics",
        "faster_coco_eval",
        "torch_pruning",
        "sklearn",
        "skimage",
        "tifffile",
    ),
    "openvino": ("openvino", "nncf", "openvino_genai", "openvino_tokenizers"),
    "onnx": ("onnx", "onnxruntime"),
    "compressed-tensors": ("compressed_tensors",),
}
"""Extra of the distribution -> the modules that it brings."""
USERS = {
    "vision": ("models.timm", "models.torchvision", "models.hf_", "data.digits", "data.scenes", "data.rock",
               "data.photographs", "tasks.accuracy", "tasks.detection", "tasks.rock", "tasks.no_reference",
               "prune.channels"),
    "openvino": ("quantize.int8", "quantize.dynamic", "quantize.float16", "export.openvino"),
    "onnx": ("export.onnx",),
    "compressed-tensors": ("export.compressed_tensors",),
}  # fmt: skip
"""Extra -> the beginnings of the words that need it."""


@dataclass(frozen=True)
class Lack:
    """An extra of which a module is missing: the words that cannot run, and the command that brings it."""

    missing: tuple[str, ...]
    words: tuple[str, ...]
    cure: str


def lacks() -> Iterator[Lack]:
    """What is missing for words that exist; imports none of the modules."""
    for extra, modules in NEEDS.items():
        missing = tuple(name for name in modules if importlib.util.find_spec(name) is None)
        if missing:
            words = tuple(word for word in plugin.words() if word.startswith(USERS[extra]))
            yield Lack(missing, words, f"pip install 'llmq-suite[{extra}]'")


def facts() -> dict[str, str]:
    """The machine, as a bug report needs it; no name of a person, a folder or a host."""
    import psutil
    import torch

    memory, place = psutil.virtual_memory(), Path.cwd()
    libraries = {name: environment.library_version(name) for name in environment.LIBRARIES}
    kept = cache()
    return {
        "llmq": " ".join(filter(None, (llmq.__version__, environment.commit()))),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": environment.processor("cpu"),
        "features": ", ".join(_features()) or "unknown",
        "bfloat16": f"multiplied {environment.bfloat16_products('cpu')}",
        "packed weights": _unpacking(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": f"{in_bytes(memory.available)} free of {in_bytes(memory.total)}",
        "disk": f"{in_bytes(free_bytes(place))} free of {in_bytes(shutil.disk_usage(place).total)}",
        "accelerator": _accelerator(),
        "cache": f"{in_bytes(sum(f.stat().st_size for f in kept.rglob('*') if f.is_file()))} in llmq's own",
        "libraries": ", ".join(f"{name} {found}" for name, found in libraries.items() if found),
    }


def _features() -> list[str]:
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8").split() if info.exists() else []
    return [flag for flag in FLAGS if flag in flags]


def _unpacking() -> str:
    from llmq.matrix.packed_linear import layout_is_known, one_pass_is_right

    if not layout_is_known():
        return "unpacked by PyTorch's operations: the int4 product of this processor has another layout"
    if one_pass_is_right():
        return "unpacked in one pass (C, compiled for this processor)"
    return "unpacked by PyTorch's operations: no C compiler (CC, else cc) made the function that makes prompts faster"


def _accelerator() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that PyTorch sees"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info()
    return f"{', '.join(names)}; CUDA {torch.version.cuda}; {in_bytes(free)} free of {in_bytes(total)} on the first"
