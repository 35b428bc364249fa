"""SIGINT and SIGTERM end a command at once, in one line and with exit code 130 or 143.

No exception is raised at the signal: libraries swallow such errors or turn them into others, and C++ that called back
into Python ends by them (`std::terminate`). Nothing need be undone either: files on disk are whole at every moment,
even after a SIGKILL.
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

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 0.5
"""Seconds for Python to handle a signal; in a long native call it cannot, and a thread ends the process."""

resumable: Path | None = None
"""The folder of a run that has begun and not ended."""
at_end: list[Callable[[], None]] = []
"""Quick actions to run before a signal ends the process."""
gently: Callable[[], bool] | None = None
"""Called at each SIGINT while it is set, in a thread of its own; the signal ends the process where it returns False."""
_ending = threading.Lock()


@contextmanager
def handled(until_exit: bool = False) -> Iterator[None]:
    """Handle SIGINT and SIGTERM inside the block, or until the process ends, as Python takes a while to end."""
    restore = _install() if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except KeyboardInterrupt:  # raised without a signal
        print(_line(), file=sys.stderr)
        sys.exit(130)
    finally:
        if restore and not until_exit:
            restore()


def _line() -> str:
    if not resumable:
        return "llmq: stopped"
    recipe, out = shlex.quote(str(resumable / "recipe.yaml")), shlex.quote(str(resumable))
    return f"llmq: stopped; go on with: llmq run {recipe} --out {out} --resume"


def _install() -> Callable[[], None]:
    """Take the signals over; returns a function that gives them back."""
    heeded = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # as nohup and a shell's & wish it
    before = {s: signal.signal(s, _end) for s in heeded}
    unwatch = _watched()

    def restore() -> None:
        unwatch()
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


def _watched() -> Callable[[], None]:
    """Start a thread that receives the signals, too; returns a function that ends the thread."""
    try:
        reader, writer = os.pipe()
    except OSError:  # no file may be opened any more: Python alone hears them
        return lambda: None
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Not `threading.Thread`: its `start` waits for ever where there is no memory for the new thread's first steps.
    _thread.start_new_thread(_watch, (reader,))

    def unwatch() -> None:
        signal.set_wakeup_fd(wakeup)
        os.close(writer)

    return unwatch


def _watch(reader: int) -> None:
    """End the process where Python does not hear the signal; the wake-up is written while native code runs, too."""
    while told := os.read(reader, 1):
        if told[0] == signal.SIGINT and gently:
            if not gently():
                _stop(told[0])
        elif told[0] in SIGNALS:
            time.sleep(PATIENCE)
            _stop(told[0])
    os.close(reader)


def _end(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGINT or not gently:  # else the thread asks, once a signal
        _stop(number)


def _stop(number: int) -> None:
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
    """Give a forked worker the default handlers, so that a signal to the worker does not wake its parent."""
    taken = [s for s in SIGNALS if signal.getsignal(s) is _end]
    if taken:
        signal.set_wakeup_fd(-1)
    for number in taken:
        signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
