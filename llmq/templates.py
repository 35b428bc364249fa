"""Templates that came with a model or with tasks: rendered under a bound of time and memory.

A chat template is a program. transformers keeps it from the machine (it may call nothing, change nothing), and not from
computing for ever: `'%999999999d'|format(1)` takes 21 GB. Here it gets a few seconds of the processor and some memory
beyond what is in use, and a number may not grow without end, for neither bound stops a single operation on one.
"""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0
"""Of the processor, for one text. Those of real templates take less than a thousandth."""
MEMORY = 512 * 2**20
"""Bytes, beyond what the process uses already."""
BITS = 4096
LONGEST = 10**8
"""Characters, or items, that one product makes at most."""
NESTED = "it calls itself, or is nested, too deep"


class TooCostly(TemplateError):
    """A template takes more time or memory than any text needs."""


class _OutOfTime(BaseException):
    """Raised within a template by the clock. No `except Exception` of a template's own functions holds it up."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates, with bounds."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.template_class = _BoundedTemplate
        self.filters["round"] = _round

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product or a power, where it is not too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if (bits + right.bit_length() if operator == "*" else bits * right) > BITS:
                raise TooCostly(f"it computes with numbers of more than {BITS} bits")
        elif operator == "*":
            times, items = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and hasattr(items, "__len__") and times * len(items) > LONGEST:
                raise TooCostly(f"it makes a text or a list of more than {LONGEST:,} parts")
        return super().call_binop(context, operator, left, right)

    def from_string(self, *arguments: Any, **settings: Any) -> Any:
        """A template, read within the bounds: what is constant in it is computed while it is read."""
        try:
            with _bounds():
                return super().from_string(*arguments, **settings)
        except (_OutOfTime, MemoryError, RecursionError, SyntaxError) as error:
            _refuse(error)


class _BoundedTemplate(Template):
    def render(self, *arguments: Any, **settings: Any) -> str:
        try:
            with _bounds():
                return super().render(*arguments, **settings)
        except (_OutOfTime, MemoryError, RecursionError) as error:
            _refuse(error)

    def generate(self, *arguments: Any, **settings: Any) -> Iterator[str]:
        try:
            with _bounds():
                yield from super().generate(*arguments, **settings)
        except (_OutOfTime, MemoryError, RecursionError) as error:
            _refuse(error)


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
def _bounds() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = _memory_in_use()
    try:
        if in_use and (before[0] == resource.RLIM_INFINITY or in_use + MEMORY < before[0]):
            resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, before[1]))
        try:
            _start_clock()
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:  # of its own: the clock may strike while it is being stopped
        resource.setrlimit(resource.RLIMIT_AS, before)


def _memory_in_use() -> int:
    """The address space of this process, in bytes; 0 on a system that does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _start_clock() -> None:
    # Python handles signals in the main thread alone, and there all that a person waits for is rendered.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGPROF, _stop)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)


def _stop(number: int, frame: Any) -> NoReturn:
    raise _OutOfTime
