"""Forward passes of one model, suspended within the model so that all of them reach a place before one goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from llmq.errors import LlmqError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Batch = TypeVar("Batch")
REHEARSE = object()


class Passes(Generic[Batch]):
    """One pass for each batch: a greenlet with a call stack of its own. One pass runs at a time, up to a wait.

    Two passes through a block whose q_proj is changed (time goes to the right; `|` waits):

        caller     start         rehearse              resume                 change q_proj       resume
        pass 1     embed |       block, from its |     block as far |                             rest of block |
        pass 2           embed | input to its end |    as its q_proj |                                          rest |

    A rehearsal goes through a module and back to the module's input, which the pass still holds. So a block can be
    observed as often as needed before the pass itself goes through the block, once.
    """

    def __init__(self, run: Callable[[Batch], object], batches: Sequence[Batch]):
        self._passes = [greenlet(partial(run, batch)) for batch in batches]

    def __len__(self) -> int:
        return len(self._passes)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Begin all passes, each up to the first wait, and give them up at the end."""
        try:
            self.resume()
            yield
        finally:
            for one in self._passes:
                one.throw(GreenletExit)  # unwinds the call stack, which holds activations

    def resume(self, some: slice = slice(None)) -> None:
        """Let some passes go on to the next wait, one after another. Raises `LlmqError` for a pass that ended."""
        for one in self._passes[some]:
            one.switch()
            if one.dead:  # the model returned where another wait was due
                raise LlmqError("a calibration pass ended before the model's last block")

    def ends(self) -> Iterator[object]:
        """What the passes return, each let go to its end in turn."""
        return (one.switch() for one in self._passes)

    def rehearse(self, some: slice = slice(None)) -> Iterator[Tensor | tuple[Tensor, ...]]:
        """Let some passes that wait before a module go through the module and come back; the outputs, one a pass."""
        return (one.switch(REHEARSE) for one in self._passes[some])

    def wait(self) -> None:
        """Suspend the pass that calls this until `resume`."""
        getcurrent().parent.switch()

    def wait_before(self, module: Module) -> None:
        """Let each pass wait before a module, and go through the module for each rehearsal."""
        forward = module.forward

        def waiting(*args: object, **kwargs: object) -> object:
            word = getcurrent().parent.switch()  # None from `resume`, REHEARSE from `rehearse`
            while word is REHEARSE:
                word = getcurrent().parent.switch(forward(*args, **kwargs))  # the outputs go to `rehearse`
            return forward(*args, **kwargs)

        module.forward = waiting
