"""SIGINT and SIGTERM end a command at once, in one line and with exit code 130 or 143.

Nothing is raised where the signal came: libraries swallow such errors, turn them into others, and C++ that called back
into Python ends by them (`std::terminate`). Nothing need be undone either: what lies on disk is whole at every moment,
as a SIGKILL leaves it, too.
"""

import _thread
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 0.5
"""Seconds for Python to hear a signal. Within a long native call it does not, and a thread ends the process."""

resumable: Path | None = None
"""The folder of a run that has begun and not ended."""
at_end: list[Callable[[], None]] = []
"""What is done first where a signal ends the process: quick, and of use to somebody."""
_ending = threading.Lock()


@contextmanager
def handled() -> Iterator[None]:
    """Answer the signals while a command runs."""
    restore = _install() if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except KeyboardInterrupt:  # raised without a signal
        print(_line(), file=sys.stderr)
        sys.exit(130)
    finally:
        if restore:
            restore()


def _line() -> str:
    """That the command was stopped, and how to go on where that is possible."""
    if not resumable:
        return "llmq: stopped"
    recipe, out = shlex.quote(str(resumable / "recipe.yaml")), shlex.quote(str(resumable))
    return f"llmq: stopped; go on with: llmq run {recipe} --out {out} --resume"


def _install() -> Callable[[], None]:
    """Take the signals over; returns a function that gives them back."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heeded = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # as nohup and a shell's & wish it
    before: dict[int, Any] = {s: signal.signal(s, _end) for s in heeded}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Not `threading.Thread`: its `start` waits for ever where there is no memory for the new thread's first steps.
    _thread.start_new_thread(_watch, (reader,))

    def restore() -> None:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)

    return restore


def _watch(reader: int) -> None:
    """End the process where Python does not hear the signal; the wake-up is written while native code runs, too."""
    while told := os.read(reader, 1):
        if told[0] in SIGNALS:
            time.sleep(PATIENCE)
            _end(told[0])
    os.close(reader)


def _end(number: int, frame: FrameType | None = None) -> None:
    if not _ending.acquire(blocking=False):  # the other thread is at it, and ends the process in a moment
        time.sleep(1)
        os._exit(128 + number)
    for act in at_end:
        with suppress(OSError):
            act()
    shown = "\x1b[?25h\r\x1b[K" if os.isatty(2) else ""  # the cursor, which a progress bar hides; and its line
    with suppress(OSError):
        os.write(2, f"{shown}{_line()}\n".encode("utf-8", "backslashreplace"))
    os._exit(128 + number)


def _forget() -> None:
    """A worker that was forked dies by its own signals, and wakes no watch of its parent."""
    taken = [s for s in SIGNALS if signal.getsignal(s) is _end]
    if taken:
        signal.set_wakeup_fd(-1)
    for number in taken:
        signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
