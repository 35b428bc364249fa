"""What is said while work goes on. Bars only where somebody watches; everything said is kept in the run's log."""

import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from llmq import faults, processes
from llmq.harmless import visible

T = TypeVar("T")
KEPT = "traceback kept in "
console = Console(stderr=True, highlight=False)
_logs: list[Path] = []


def say(message: str) -> None:
    """One line to the person and to the log of the run; of several processes only the first speaks."""
    if not processes.is_first():
        return
    console.print(visible(message), markup=False, soft_wrap=True)
    log(message)


def log(message: str) -> None:
    """Write something to the log of the run alone."""
    for file in _logs:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {visible(message)}\n")


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Keep what is said in a file too, and where in the code it went wrong if it does."""
    _logs.append(path)
    try:
        yield
    except BaseException as error:
        faults.note_folder(error, path.parent)
        keep_traceback(error, path)
        raise
    finally:
        _logs.remove(path)


def keep_traceback(error: BaseException, path: Path) -> None:
    """Add the traceback of an error to a file, and note on the error where that is; once, and only where it can be."""
    if kept_traceback(error):
        return
    # The disk may be full, or the folder gone: that must not hide the error itself.
    with suppress(OSError), path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {''.join(traceback.format_exception(error))}\n")
        stream.flush()
        error.add_note(f"{KEPT}{path}")


def kept_traceback(error: BaseException) -> str:
    """The file that holds the traceback of an error; empty if none does."""
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(KEPT) for note in notes if note.startswith(KEPT)), "")


class Bar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, title: str, total: int | None, start: int = 0):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns: list[Any] = [
            TextColumn("  {task.description}", markup=False),
            BarColumn(30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        ]
        self._began = time.perf_counter()
        hidden = not (sys.stderr.isatty() and processes.is_first())
        self._progress = Progress(*columns, console=console, transient=True, disable=hidden)
        self._task = self._progress.add_task(title, total=total, completed=start, note="")
        self._progress.start()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self._began

    def advance(self, note: str = "") -> None:
        """One unit of work is done."""
        self._progress.update(self._task, advance=1, note=note)

    def close(self) -> None:
        """Take it off the screen."""
        self._progress.stop()


def track(items: Iterable[T], title: str) -> Iterator[T]:
    """The items, with a bar."""
    bar = Bar(title, len(items) if isinstance(items, Sized) else None)
    try:
        for item in items:
            yield item
            bar.advance()
    finally:
        bar.close()
