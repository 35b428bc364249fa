"""The command as a child of one warmed process: with limits of memory and time, and what it printed."""

import atexit
import gc
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

SECONDS = 10
MEMORY = 3 * 2**29
"""Bytes that a child may take beside what its parent has mapped."""
CRASH = 99
"""The exit code of a child whose exception went past the command."""
learns = True
"""Whether this process imports what a child imported, so that the next one need not."""
_LEARNT: set[str] = set()
_for_good = ExitStack()
atexit.register(_for_good.close)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    argv: Sequence[str]
    code: int
    """Negative: the signal that ended it."""
    out: str
    err: str
    seconds: float

    def told(self) -> str:
        """For the message of an assertion."""
        return (
            f"{' '.join(self.argv)}: code {self.code} after {self.seconds:.1f} s\n{self.out[-300:]}\n{self.err[-2500:]}"
        )


def rates_at_hand(kinds: Iterable[Any], device: str) -> dict[Any, float]:
    """The rates by which a run foretells its time; a case need not wait two seconds for those of its machine."""
    return dict.fromkeys([*kinds, "copy"], 1e9)


def no_machine_is_measured() -> None:
    """Runs of this process, and of those forked from it, have rates at hand."""
    from llmq.planning import rates

    rates.measure = rates_at_hand


def warm_words() -> None:
    """Import what `llmq check` needs, once; a child that copies no more is made in a few milliseconds."""
    import scipy.stats  # noqa: F401

    import llmq.cli
    from llmq import pipeline, plugin, recipe, targets  # noqa: F401
    from llmq.report import html

    no_machine_is_measured()
    llmq.cli.command_line()
    for template in html.templates().list_templates(["j2"]):
        html.templates().get_template(template)
    for word in plugin.words():
        plugin.load(word)
    freeze()


def freeze() -> None:
    """Or every child would copy what its collector touches."""
    from llmq.environment import set_aside

    gc.collect()
    _for_good.enter_context(set_aside())


def warm() -> None:
    """Import what all commands need, once; one thread, as a child cannot use the threads of its parent."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    from llmq import answers, pipeline, plugin, targets  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answers.own_code()
    warm_words()


def command(
    argv: Sequence[str],
    folder: Path,
    before: Callable[[], None] = lambda: None,
    memory: int = MEMORY,
    seconds: int = SECONDS,
) -> Ended:
    """Run `llmq ARGV` in `folder`; `before` is done in the child, just before the command."""
    out, err = folder / ".out", folder / ".err"
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        _be_child(argv, folder, out, err, before, memory, seconds)
    _, status = os.waitpid(pid, 0)
    took = time.perf_counter() - began
    if learns:
        _learn(folder / ".imported")
    texts = [file.read_bytes()[-20_000:].decode(errors="replace") if file.exists() else "" for file in (out, err)]
    return Ended(argv, os.waitstatus_to_exitcode(status), *texts, took)


def _be_child(
    argv: Sequence[str], folder: Path, out: Path, err: Path, before: Callable[[], None], memory: int, seconds: int
) -> None:
    code, known = CRASH, len(sys.modules)
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1) for n in (1, 2))
        os.environ |= {"LLMQ_CACHE": str(folder / "cache")}
        os.chdir(folder)
        sys.argv = ["llmq", *argv]
        _limit(resource.RLIMIT_AS, mapped() + memory)
        before()
        from llmq import cli

        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:  # noqa: BLE001  # the parent is told of it
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            with suppress(Exception):  # what the machine does not let it write
                if (new := len(sys.modules) - known) > 0:  # the last ones: to touch the others would copy them
                    (folder / ".imported").write_text("\n".join(islice(reversed(sys.modules), new)))
        finally:
            os._exit(code)


def _learn(imported: Path) -> None:
    names = set(imported.read_text().split()) - _LEARNT if imported.is_file() else ()
    for name in names:
        _LEARNT.add(name)
        with suppress(Exception):
            importlib.import_module(name)
    if names:
        freeze()


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def mapped() -> int:
    """The bytes of addresses that this process has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def judge(ended: Ended, seed: int, allowed: Collection[int] = (0, 2)) -> str:
    """A word for how it ended. Raises `AssertionError` for a crash, a hang, a traceback, or anything but one line."""
    told = f"seed {seed}: {ended.told()}"
    assert ended.code != -signal.SIGALRM, f"HANG {told}"
    assert ended.code >= 0, f"CRASH {told}"
    assert "Traceback" not in ended.out + ended.err, f"TRACEBACK {told}"
    assert "unforeseen" not in ended.err, f"UNFORESEEN {told}"
    assert ended.code in allowed, f"CODE {told}"
    lines = [line for line in ended.err.splitlines() if line.startswith("llmq: ")]
    if ended.code in (2, 4):
        assert len(lines) == 1, f"LINES {told}"
        assert ended.err.splitlines()[-1] == lines[0], f"LAST LINE {told}"
        assert len(lines[0]) < 1500, f"LONG {told}"
        assert lines[0].isprintable(), f"ESCAPES {told}"
    return str(ended.code)
