"""A conversation on the terminal or through a pipe, with one language model or with two side by side."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmq import predictors, stopping
from llmq.errors import UserError, visible
from llmq.terminal import say
from llmq.text.answering import Answering
from llmq.types import JsonObject, Loaded

if TYPE_CHECKING:
    from llmq.text.dialogue import Dialogue

PROMPT = "> "
HINT = "\n(again, or Ctrl-D, to end)\n"
DIFFERS = "bold yellow"


def settings(options: JsonObject) -> Answering:
    """The settings of answers. Raises `UserError` for a value that does not fit."""
    return predictors.settings(Answering, options)


class Interrupts:
    """Ctrl-C: the first stops the answer, the next one before another turn ends the command."""

    def __init__(self) -> None:
        self.asked = False
        self.answering = False

    def heard(self) -> bool:
        """Called at each Ctrl-C; False ends the process."""
        if self.asked:
            return False
        self.asked = True
        if not self.answering:
            with suppress(OSError):
                os.write(2, HINT.encode() + PROMPT.encode())
        return True

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Heed Ctrl-C in this way inside the block."""
        before, stopping.gently = stopping.gently, self.heard
        try:
            yield
        finally:
            stopping.gently = before

    @contextmanager
    def during_an_answer(self) -> Iterator[None]:
        """Let Ctrl-C stop the answer inside the block."""
        self.asked, self.answering = False, True
        try:
            yield
        finally:
            self.answering = False


def converse(opened: Sequence[tuple[str, Loaded]], how: Answering) -> None:
    """Read turns until the input ends, and write the answers of each model as they come.

    Through a pipe the answers alone go to the standard output, and a turn that cannot be answered is an error.
    """
    from llmq.text.dialogue import Dialogue

    talks = [Dialogue(name, loaded, how) for name, loaded in opened]
    for name in {talk.name: None for talk in talks if not talk.prompting.templated and not how.raw}:
        say(f"{name} has no chat template: what you write is continued as plain text")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    interrupts = Interrupts()
    with interrupts.heeded() if terminal else nullcontext():
        for turn in _turns(terminal):
            if turn == "/reset":
                for talk in talks:
                    talk.reset()
                say("forgotten")
                continue
            with interrupts.during_an_answer():
                try:
                    _answer(talks, turn, terminal, interrupts)
                except UserError as error:
                    if not terminal:
                        raise
                    say(str(error))


def _turns(terminal: bool) -> Iterator[str]:
    """What is written, line by line, up to the end of the input or `/exit`; empty lines are passed over."""
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited then
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(PROMPT) if terminal else sys.stdin.readline()
        except EOFError:
            print()
            return
        if (not terminal and not line) or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip().encode("utf-8", "replace").decode()


def _answer(talks: "Sequence[Dialogue]", turn: str, terminal: bool, interrupts: Interrupts) -> None:
    """Write the answers to one turn as they come; those of two models in two columns on a terminal."""
    if len(talks) == 1:
        for piece in _until_stopped(talks[0], turn, interrupts):
            print(visible(piece), end="", flush=True)
        print(flush=True)
    elif terminal:
        _in_columns(talks, turn, interrupts)
    else:
        for talk in talks:
            print(f"[{visible(talk.name)}]\n{visible(''.join(talk.answer(turn)))}")
        print(visible(_difference(*(talk.last for talk in talks))), flush=True)


def _until_stopped(talk: "Dialogue", turn: str, interrupts: Interrupts) -> Iterator[str]:
    """The pieces of an answer, up to Ctrl-C; what was dropped of the conversation is said first."""
    for piece in talk.answer(turn):
        yield piece
        if interrupts.asked:
            return


def _in_columns(talks: "Sequence[Dialogue]", turn: str, interrupts: Interrupts) -> None:
    said = ["" for _ in talks]
    console = Console(highlight=False)
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        for i, talk in enumerate(talks):
            for piece in _until_stopped(talk, turn, interrupts):
                said[i] += visible(piece)
                live.update(_table(talks, [Text(text) for text in said]))
    console.print(_table(talks, _marked(*said)))


def _table(talks: "Sequence[Dialogue]", texts: Sequence[Text]) -> Table:
    table = Table(expand=True, show_lines=False)
    for talk in talks:
        table.add_column(Text(visible(talk.name)), ratio=1)
    table.add_row(*texts)
    return table


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


def _marked(*texts: str) -> list[Text]:
    """Both texts, with the words that the other has not in another style."""
    first, second = (_words(text) for text in texts)
    marked = [Text(), Text()]
    for what, a0, a1, b0, b1 in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        for text, words in zip(marked, (first[a0:a1], second[b0:b1]), strict=True):
            text.append("".join(words), "" if what == "equal" else DIFFERS)
    return marked


def _difference(*texts: str) -> str:
    """The place from which two answers differ, in one line."""
    first, second = (_words(text) for text in texts)
    if first == second:
        return "(both the same)"
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    words = (repr(each[same].strip()) if same < len(each) else "the end" for each in (first, second))
    return f"(differ from word {same + 1}: {' and '.join(words)})"
