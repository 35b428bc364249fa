"""SIGINT and SIGTERM end a command within two seconds, in one line and with exit code 130 or 143."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 1.5
"""Seconds for what is open to be closed. A long call into native code hears nothing; after them, the process ends."""

resumable: Path | None = None
"""The folder of a run that has begun and not ended."""
_said = threading.Lock()
_stopped: list[int] = []


class Stopped(BaseException):
    """A signal came. No `Exception`: what goes on after errors must not go on after this."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def handled() -> Iterator[None]:
    """Answer the signals while a command runs."""
    if _said.locked() and not _stopped:
        _said.release()
    restore = _install() if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        if line := _line():
            with suppress(OSError, ValueError):  # nobody hears it
                print(line, file=sys.stderr, flush=True)
        if _stopped:  # libraries can take seconds to be torn down, and no thread can watch over it
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(128 + _stopped[0])
        sys.exit(130)
    finally:
        if restore and not _stopped:  # after a signal, the watch goes on until the process has ended
            restore()


def _line() -> str:
    """That the command was stopped, and how to go on where that is possible; empty once it was said."""
    if not _said.acquire(blocking=False):
        return ""
    line = "llmq: stopped"
    if resumable:
        recipe, out = shlex.quote(str(resumable / "recipe.yaml")), shlex.quote(str(resumable))
        line += f"; go on with: llmq run {recipe} --out {out} --resume"
    return line


def _install() -> Any:
    """Take the signals over; returns a function that gives them back."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heeded = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # as nohup and a shell's & wish it
    before = {s: signal.signal(s, _raise) for s in heeded}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    unraisable, sys.unraisablehook = sys.unraisablehook, _ignore_stopped
    threading.Thread(target=_watch, args=(reader, os.getpid()), daemon=True).start()

    def restore() -> None:
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)

    return restore


def _raise(number: int, frame: FrameType | None) -> None:
    if _stopped:  # a second one: the person is in a hurry
        _end(number)
    _stopped.append(number)
    raise Stopped(number)


def _watch(reader: int, process: int) -> None:
    """End the process if it lives on after a signal; the wake-up tells of it while native code runs, too."""
    while told := os.read(reader, 1):
        if told[0] in SIGNALS:
            time.sleep(PATIENCE)
            _end(told[0])
    os.close(reader)


def _end(number: int) -> None:
    if line := _line():
        shown = "\x1b[?25h\r\x1b[K" if os.isatty(2) else ""  # the cursor, which a progress bar hides; and its line
        with suppress(OSError):
            os.write(2, f"{shown}{line}\n".encode("utf-8", "backslashreplace"))
    os._exit(128 + number)


def _ignore_stopped(problem: Any) -> None:
    if not isinstance(problem.exc_value, Stopped):  # within a destructor: the watch ends the process
        sys.__unraisablehook__(problem)


def _forget() -> None:
    """A worker that was forked dies by its own signals, and wakes no watch of its parent."""
    if any(signal.getsignal(s) is _raise for s in SIGNALS):
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
