"""Templates that came with a model or with tasks are rendered within bounds of time and memory.

A chat template is a program. transformers keeps it from the machine (it may call nothing, change nothing), and not from
computing for ever: `'%999999999d'|format(1)` takes 21 GB. Here a template gets a few seconds of the processor; sums,
products and joined texts have a largest size; and a template that does anything besides gets a bounded part of memory.
The bound on memory costs as much time as a short text, so plain templates, such as those of models, go without.
"""

import atexit
import os
import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from jinja2 import Template, TemplateError, nodes
from jinja2.filters import do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0
"""Processor time for one text; real templates take less than a thousandth of it."""
MEMORY = 512 * 2**20
"""Bytes beyond those that the process uses already."""
BITS = 4096
LONGEST = 5 * 10**7
"""The most characters of a text, or items of a list, that a template makes."""
CHECKED = "checked"
DAY = datetime(2024, 7, 26)
"""The date that chat templates write in training and measuring, or the same recipe would give other tokens each day.

It is the date that Llama 3's template falls back to.
"""
T = TypeVar("T")
_now: ContextVar[datetime] = ContextVar("_now", default=DAY)

PLAIN = frozenset(
    str.split("""
    Template Output TemplateData Const Name NSRef Getattr Getitem Slice For If CondExpr Compare Operand And Or Not Test
    Add Sub Mod Mul Concat Neg Pos Call Keyword Pair Dict List Assign AssignBlock Macro CallBlock Filter Break Continue
    ExtensionAttribute EvalContextModifier ScopedEvalContextModifier Scope
""")
)
FILTERS = frozenset(
    str.split(f"""
    {CHECKED} trim tojson length count upper lower first last default d string int items select reject selectattr
    rejectattr map list join reverse unique dictsort safe capitalize title
""")
)
METHODS = frozenset(
    str.split("""
    strip lstrip rstrip split rsplit startswith endswith upper lower title capitalize items keys values get find index
    count removeprefix removesuffix splitlines isdigit
""")
)
NAMES = ("raise_exception", "strftime_now", "namespace", "range")
"""Nodes, filters, methods and functions of plain templates: none makes more than it is given but the bounded ones."""


class TooCostly(TemplateError):
    """The error for a template that takes more time or memory than any text needs."""


class _OutOfTime(BaseException):
    """Raised inside a template by the clock; no `except Exception` on the way catches a `BaseException`."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates, with bounds."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.template_class = _BoundedTemplate
        self.filters |= {"round": _round, CHECKED: _checked}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The parts as one text: all that a template, a macro or a block writes."""
        parts = list(parts)
        _check_length(sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """The product, power, remainder or formatted text. Raises `TooCostly` for a large one."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if (bits * right if operator == "**" else bits + right.bit_length()) > BITS:
                raise TooCostly(f"it computes with numbers of more than {BITS} bits")
        elif operator == "*":
            times, items = (left, right) if isinstance(left, int) else (right, left)
            _check_length(times * len(items) if isinstance(times, int) and hasattr(items, "__len__") else 0)
        elif operator == "%" and isinstance(left, str):  # '%999999999d' % 1
            with _memory_bound():
                return left % right
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The parsed template, with a length check on each sum that is assigned to a name or passed to a call."""
        tree = super()._parse(source, name, filename)
        for assign in tree.find_all(nodes.Assign):
            assign.node = _with_check(assign.node)
        for call in tree.find_all(nodes.Call):
            call.args = [_with_check(argument) for argument in call.args]
        return tree

    def from_string(self, source: str | nodes.Template, *settings: Any) -> Template:
        """The template, parsed within the bounds, as parsing computes constants."""
        with _bounds():
            self.globals["strftime_now"] = lambda form: _now.get().strftime(form)
            made = super().from_string(source, *settings)
            vars(made)["is_plain"] = _is_plain(source if isinstance(source, nodes.Template) else self.parse(source))
            return made


class _BoundedTemplate(Template):
    is_plain = False

    def render(self, *arguments: object, **settings: object) -> str:
        with _bounds(memory=not self.is_plain):
            return super().render(*arguments, **settings)

    def generate(self, *arguments: object, **settings: object) -> Iterator[str]:
        with _bounds(memory=not self.is_plain):
            yield from super().generate(*arguments, **settings)


@contextmanager
def _bounds(memory: bool = True) -> Iterator[None]:
    try:
        with _the_clock, _memory_bound() if memory else nullcontext():
            yield
    except (_OutOfTime, MemoryError, RecursionError, SyntaxError) as error:
        told = {_OutOfTime: f"it takes more than {SECONDS:g} s", MemoryError: f"it takes more than {MEMORY >> 20} MB"}
        raise TooCostly(told.get(type(error), "it calls itself, or is nested, too deep")) from None


def _is_plain(tree: nodes.Template) -> bool:
    """True if no part of a template needs the bound on memory."""
    for node in tree.find_all(nodes.Node):
        if type(node).__name__ not in PLAIN:
            return False
        if isinstance(node, nodes.Filter) and not _is_plain_filter(node):
            return False
        held = [p.value for p in node.items] if isinstance(node, nodes.Dict) else getattr(node, "items", ())
        if isinstance(node, nodes.Dict | nodes.List) and not all(isinstance(each, nodes.Const) for each in held):
            return False  # lists that hold one another may stand for more than they are
        if isinstance(node, nodes.For) and node.recursive:
            return False
        if isinstance(node, nodes.Call) and not _is_plain_call(node.node, tree):
            return False
    return True


def _is_plain_filter(node: nodes.Filter) -> bool:
    """True for a known filter without keywords, but for `join` with a long separator and `map` of an unknown filter."""
    values = [argument.value if isinstance(argument, nodes.Const) else None for argument in node.args]
    short = all(value is not None and len(str(value)) < 99 for value in values) if node.name == "join" else True
    known = all(value in FILTERS for value in values) if node.name == "map" else True
    return node.name in FILTERS and not node.kwargs and short and known


def _is_plain_call(called: nodes.Node, tree: nodes.Template) -> bool:
    if isinstance(called, nodes.Name):
        macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        return called.name in NAMES or called.name in macros
    return isinstance(called, nodes.ExtensionAttribute) or (
        isinstance(called, nodes.Getattr) and called.attr in METHODS
    )


def _with_check(value: Any) -> Any:
    grown = (nodes.Add, nodes.Concat)
    grows = isinstance(value, grown) or any(value.find(kind) for kind in grown)
    return nodes.Filter(value, CHECKED, [], [], None, None, lineno=value.lineno) if grows else value


def _checked(value: T) -> T:
    if isinstance(value, str | list | tuple):
        _check_length(len(value))
    return value


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise TooCostly(f"it makes a text or a list of more than {LONGEST:,} parts")


def _round(value: float, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common") -> float:
    if abs(precision) > 308:  # beyond the range of a float; `do_round` computes 10 to this power
        raise TooCostly(f"it rounds to {precision} digits")
    return do_round(value, precision, method)


@cache
def bound_chat_templates() -> None:
    """Make transformers render chat templates within the bounds, for the rest of the process."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
    chat_template_utils._compile_jinja_template.cache_clear()


@contextmanager
def dated_today() -> Iterator[None]:
    """Let chat templates write today's date, for whoever asks a model something."""
    before = _now.set(datetime.now())
    try:
        yield
    finally:
        _now.reset(before)


@contextmanager
def _memory_bound() -> Iterator[None]:
    in_use = _memory_in_use()
    if not in_use:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (in_use + MEMORY, *before) if limit != resource.RLIM_INFINITY]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _memory_in_use() -> int:
    """The address space of this process, in bytes; 0 on a system that does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class _Clock:
    """A timer that fires every `SECONDS` of processor time; a template in which it fires twice is stopped.

    A timer for each text would take longer than the rendering.
    """

    def __init__(self) -> None:
        self.goes, self.depth, self.text, self.struck = False, 0, 0, -1

    def __enter__(self) -> None:
        if not self.depth:
            self.text += 1
            if not self.goes:
                self.start()
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1

    def strike(self, number: int, frame: FrameType | None) -> None:
        if not self.depth:
            self.goes = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        elif self.struck == self.text:
            raise _OutOfTime
        else:
            self.struck = self.text

    def start(self) -> None:
        # Python handles signals in the main thread alone, and there all that a person waits for is rendered.
        if threading.current_thread() is threading.main_thread():
            self.goes = True
            signal.signal(signal.SIGPROF, self.strike)
            signal.siginterrupt(signal.SIGPROF, False)
            signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)


_the_clock = _Clock()
atexit.register(signal.setitimer, signal.ITIMER_PROF, 0)  # a later signal would find no handler
