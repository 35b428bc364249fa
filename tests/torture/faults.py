"""Machines that fail while a tiny job runs: one line, exit code 4, whole stages stay whole, and resuming works."""

import ctypes
import functools
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from torture import child
from torture.checkpoints import copy_of
from torture.child import Ended, command, judge, mapped

RECIPE = (
    "model: {causal_lm: {weights: m}}\nsteps:\n- quantize.rtn: {group_size: 32}\n"
    "- adapt.lora: {data: d.jsonl, r: 2, max_steps: 2, max_length: 32, save_steps: 1, held_out_rows: 0}\n"
    "evaluate:\n- size\n- perplexity: {data: d.jsonl, part: all, limit: 1, window: 16}\nseed: 0\n"
)
RUN = ("run", "r.yaml", "--out", "o", "--no-cache")
SECONDS = 60
CLONE_NEWNS, CLONE_NEWUSER, MS_BIND, MS_REMOUNT, MS_RDONLY, MS_PRIVATE = 0x20000, 0x10000000, 4096, 32, 1, 0x44000
Fault = Callable[[random.Random, Path], None]


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _file_size(dice: random.Random, folder: Path) -> None:
    _limit(resource.RLIMIT_FSIZE, dice.choice([3000, 10_000, 30_000, 60_000, 100_000]))


def _memory(dice: random.Random, folder: Path) -> None:
    _limit(resource.RLIMIT_AS, mapped() + dice.choice([2**16, 2**20, 2**22, 2**24, 2**25, 2**26]))


def _open_files(dice: random.Random, folder: Path) -> None:
    _limit(resource.RLIMIT_NOFILE, dice.choice([3, 4, 5, 6, 8, 12]))


def _mount(what: str, where: Path, kind: str, flags: int, data: str) -> None:
    """Mount in a namespace of this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(what.encode(), str(where).encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), f"mount of {kind or what}")


def _alone() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS if os.geteuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    libc.mount(b"none", b"/", None, MS_PRIVATE, None)


def _full_disk(dice: random.Random, folder: Path) -> None:
    """A disk of a few pages; what the run left is copied out again, so that it can go on."""
    _alone()
    kept = folder / "kept"
    kept.mkdir()
    (folder / "o").mkdir()
    _mount(str(kept), kept, "", MS_BIND, "")
    pages = dice.choice([1, 4, 10, 20, 40, 60, 90])
    _mount("tmpfs", folder / "o", "tmpfs", 0, f"size={pages * 4096}")
    stock = sys.exit

    def copy_out(code: object = None) -> None:
        shutil.copytree(folder / "o", kept, dirs_exist_ok=True)
        stock(code)  # type: ignore[arg-type]

    sys.exit = copy_out  # type: ignore[assignment]


def _read_only(dice: random.Random, folder: Path) -> None:
    _alone()
    _mount(str(folder), folder, "", MS_BIND, "")
    _mount(str(folder), folder, "", MS_BIND | MS_REMOUNT | MS_RDONLY, "")
    os.chdir(folder)


def _capabilities_dropped() -> None:
    """Root without capabilities is held to the permissions of files as everybody is; see capset(2)."""
    version_3 = 0x20080522
    head, none = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(head, none):
        raise OSError(ctypes.get_errno(), "capset")


def _not_allowed(dice: random.Random, folder: Path) -> None:
    """A user who may not read or write one of the things that are needed."""
    target = dice.choice(["m/model.safetensors", "m/config.json", "m/tokenizer.json", "m", "d.jsonl", "r.yaml", "."])
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, 0o777 if path.is_dir() else 0o666)
    os.chmod(folder / target, 0o555 if target == "." else 0)
    _capabilities_dropped()


def _vanishing(dice: random.Random, folder: Path) -> None:
    """A folder that somebody removes while it is written or read."""
    target, wait = dice.choice(["o", "o", "o", "m", "cache"]), dice.uniform(0, _straight()[1])

    def remove() -> None:
        time.sleep(wait)
        shutil.rmtree(folder / target, ignore_errors=True)

    threading.Thread(target=remove, daemon=True).start()


def _stream(dice: random.Random, folder: Path) -> None:
    """Standard output, or error, that is full or closed."""
    number = dice.choice([1, 2])
    if dice.random() < 0.5:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)


def _cache(dice: random.Random, folder: Path) -> None:
    """A cache that is no folder, or that nobody may write."""
    (folder / "cache").write_text("")


def _library(dice: random.Random, folder: Path) -> None:
    """A library that fails as only the machine lets it fail, at a call chosen by chance."""
    import torch

    errors = [
        MemoryError(), RuntimeError("std::bad_alloc"), OSError(28, "No space left on device"), OSError(5, "I/O error"),
        RuntimeError("CUDA error: device-side assert triggered"), SystemError("null argument without an error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123456789 bytes."),
    ]  # fmt: skip
    error, left = dice.choice(errors), [dice.randrange(1, 400)]
    stock = torch.nn.functional.linear

    def linear(*given: object, **named: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return stock(*given, **named)  # type: ignore[arg-type]

    torch.nn.functional.linear = linear  # type: ignore[assignment]


FAULTS: tuple[Fault, ...] = (
    _file_size, _full_disk, _read_only, _not_allowed, _vanishing, _stream, _cache, _library
)  # fmt: skip
STARVING: tuple[Fault, ...] = (_memory, _open_files)
"""Faults under which an import may fail as well."""


def warm() -> None:
    """Import what the job needs."""
    child.warm()
    _straight()
    _straight.cache_clear()  # its first run imported more than those that follow


@functools.cache
def _straight() -> tuple[dict[str, bytes], float]:
    """What the job leaves where nothing fails, and its seconds."""
    folder = _job(Path(tempfile.mkdtemp(prefix="llmq-torture-")))
    ended = command(RUN, folder, seconds=SECONDS)
    assert ended.code == 0, ended.told()
    try:
        return _weights(folder / "o"), ended.seconds
    finally:
        shutil.rmtree(folder)


def _job(folder: Path) -> Path:
    copy_of("llama", folder / "m")
    (folder / "d.jsonl").write_text('{"text": "one two three four five six seven"}\n' * 4)
    (folder / "r.yaml").write_text(RECIPE)
    return folder


def _weights(run: Path) -> dict[str, bytes]:
    return {f"{f.parent.name}/{f.name}": f.read_bytes() for f in sorted(run.glob("[12]-*/*.safetensors"))}


def once(seed: int, folder: Path) -> str:
    """One fault in one run."""
    return bear(FAULTS[seed % len(FAULTS)], seed, folder)


def bear(fault: Fault, seed: int, folder: Path) -> str:
    """A run with a fault; then the same run again, with nothing wrong, to the same bytes."""
    dice = random.Random(f"faults {seed}")
    straight, _ = _straight()
    _job(folder)
    ended = command(RUN, folder, lambda: fault(dice, folder), seconds=SECONDS)
    word = _judge(fault, ended, seed)
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, 0o777)
    if fault is _full_disk and (folder / "kept").exists():
        shutil.rmtree(folder / "o")
        (folder / "kept").rename(folder / "o")
    if not (folder / "m").exists():
        copy_of("llama", folder / "m")
    if fault is _cache:
        (folder / "cache").unlink()
    for stage in (folder / "o").glob("[0-9]-*"):
        assert (stage / "artifact.json").is_file(), f"seed {seed}: half a stage {stage.name}"
    resume = ["--resume"] if (folder / "o" / "recipe.yaml").is_file() else []
    if not resume:
        shutil.rmtree(folder / "o", ignore_errors=True)
    again = command([*RUN, *resume], folder, seconds=SECONDS)
    assert again.code == 0, f"RESUME seed {seed} {fault.__name__}: {again.told()}\nafter: {ended.told()}"
    assert _weights(folder / "o") == straight, f"BYTES seed {seed} {fault.__name__}: others after {ended.told()}"
    return f"{fault.__name__[1:]} {word}"


def _judge(fault: Fault, ended: Ended, seed: int) -> str:
    if fault is _stream:  # what could not be printed cannot be judged
        assert ended.code in (0, 4), f"CODE seed {seed} {fault.__name__}: {ended.told()}"
        return str(ended.code)
    if fault is _library and "unforeseen" in ended.err:  # that is the right word for it
        ended = Ended(ended.argv, ended.code, ended.out, ended.err.replace("unforeseen", "told"), ended.seconds)
    return judge(ended, seed, allowed=(0, 2, 4))
