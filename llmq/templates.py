"""Templates that came with a model or with tasks: rendered under a bound of time and memory.

A chat template is a program. transformers keeps it from the machine (it may call nothing, change nothing), and not from
computing for ever: `'%999999999d'|format(1)` takes 21 GB. Here it gets a few seconds of the processor; what it joins,
adds and multiplies has a largest size; and one that does anything besides gets no more than some memory beyond what is
in use. That last bound costs as much time as a short text, so that plain templates, as those of models are, go without.
"""

import atexit
import os
import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0
"""Of the processor, for one text. Those of real templates take less than a thousandth."""
MEMORY = 512 * 2**20
"""Bytes, beyond what the process uses already."""
BITS = 4096
LONGEST = 5 * 10**7
"""Characters of a text that is made, or items of a list."""
FREE = nullcontext()
CHECKED, SIZED = "checked", (str, list, tuple)
NESTED = "it calls itself, or is nested, too deep"

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
"""What a plain template consists of, and calls: nothing of it makes more than it is given, but what is bounded here."""


class TooCostly(TemplateError):
    """A template takes more time or memory than any text needs."""


class _OutOfTime(BaseException):
    """Raised within a template by the clock. No `except Exception` of a template's own functions holds it up."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates, with bounds."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.template_class = _BoundedTemplate
        self.filters |= {"round": _round, CHECKED: _checked}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The parts as one text: all that a template, a macro or a block writes."""
        parts = list(parts)
        _check_length(sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product, power or rest, where it is not too large."""
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
        """What is kept is checked where it could have grown: a sum that stands in a name, or is given to a macro."""
        tree = super()._parse(source, name, filename)
        for assign in tree.find_all(nodes.Assign):
            assign.node = _with_check(assign.node)
        for call in tree.find_all(nodes.Call):
            call.args = [_with_check(argument) for argument in call.args]
        return tree

    def from_string(self, source: Any, *arguments: Any, **settings: Any) -> Any:
        """A template, read within the bounds: what is constant in it is computed while it is read."""
        try:
            with _the_clock, _memory_bound():
                made: Any = super().from_string(source, *arguments, **settings)
                made.is_plain = _is_plain(self.parse(source))
                return made
        except (_OutOfTime, MemoryError, RecursionError, SyntaxError) as error:
            _refuse(error)


class _BoundedTemplate(Template):
    is_plain = False

    def render(self, *arguments: Any, **settings: Any) -> str:
        try:
            with _the_clock, _memory_bound() if not self.is_plain else FREE:
                return super().render(*arguments, **settings)
        except (_OutOfTime, MemoryError, RecursionError) as error:
            _refuse(error)

    def generate(self, *arguments: Any, **settings: Any) -> Iterator[str]:
        try:
            with _the_clock, _memory_bound() if not self.is_plain else FREE:
                yield from super().generate(*arguments, **settings)
        except (_OutOfTime, MemoryError, RecursionError) as error:
            _refuse(error)


def _is_plain(tree: nodes.Template) -> bool:
    """Whether a template consists of nothing but what is bounded without a bound of memory."""
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
    """`join` may put a long text between many others, and `map` calls another filter by its name."""
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


def _checked(value: Any) -> Any:
    if isinstance(value, SIZED):
        _check_length(len(value))
    return value


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise TooCostly(f"it makes a text or a list of more than {LONGEST:,} parts")


def _refuse(error: BaseException) -> NoReturn:
    told = {_OutOfTime: f"it takes more than {SECONDS:g} s", MemoryError: f"it takes more than {MEMORY >> 20} MB"}
    raise TooCostly(told.get(type(error), NESTED)) from None


def _round(value: Any, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 308:  # the range of a float; it would be taken as a power of 10
        raise TooCostly(f"it rounds to {precision} digits")
    return do_round(value, precision, method)


@cache
def bound_chat_templates() -> None:
    """From now on transformers renders chat templates within the bounds."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
    chat_template_utils._compile_jinja_template.cache_clear()


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
    """Strikes each `SECONDS` of the processor while templates are rendered, and stops one that it strikes twice in.

    To set a clock for each text would take longer than to render it.
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

    def strike(self, number: int, frame: Any) -> None:
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
atexit.register(signal.setitimer, signal.ITIMER_PROF, 0)  # later than that nobody would answer it
