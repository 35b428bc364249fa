"""Messages, which the log of the run keeps as well, and progress bars, which appear on a terminal only."""

import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from llmq import processes
from llmq.errors import note_folder, noted, visible

T = TypeVar("T")
KEPT = "traceback kept in "
console = Console(stderr=True, highlight=False)
_logs: list[Path] = []


def say(message: str) -> None:
    """Print one line, and write it to the log of the run; of several processes only the first does so."""
    if not processes.is_first():
        return
    console.print(visible(message), markup=False, soft_wrap=True)
    log(message)


def counted(count: int, name: str) -> str:
    """A number of things with their name: `1 step`, `2 steps`."""
    return f"{count:,} {name}{'s' * (count != 1)}"


def log(message: str) -> None:
    """Write a message to the log of the run alone."""
    for file in _logs:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {visible(message)}\n")


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Keep messages in a file too, and the traceback of an error."""
    _logs.append(path)
    try:
        yield
    except BaseException as error:
        note_folder(error, path.parent)
        keep_traceback(error, path)
        raise
    finally:
        _logs.remove(path)


def keep_traceback(error: BaseException, path: Path) -> None:
    """Add the traceback of an error to a file, and note the file on the error; once, and if it can be written."""
    if kept_traceback(error):
        return
    # The disk may be full, or the folder gone: that must not hide the error itself.
    with suppress(OSError), path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {''.join(traceback.format_exception(error))}\n")
        stream.flush()
        error.add_note(f"{KEPT}{path}")


def kept_traceback(error: BaseException) -> str:
    """The file that holds the traceback of an error; empty if none does."""
    return noted(error, KEPT)


class Bar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, title: str, total: int | None, start: int = 0):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        name = TextColumn("  {task.description}", markup=False)
        note = TextColumn("{task.fields[note]}", markup=False)
        columns = name, BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), note
        hidden = not (sys.stderr.isatty() and processes.is_first())
        self._progress = Progress(*columns, console=console, transient=True, disable=hidden)
        self._task = self._progress.add_task(title, total=total, completed=start, note="")
        self._progress.start()

    def advance(self, note: str = "") -> None:
        """Count one unit of work as done."""
        self._progress.update(self._task, advance=1, note=note)

    def close(self) -> None:
        """Remove the bar from the screen."""
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
