"""The calibration batches on their way through a model, shared out over the processes of a launcher.

Each process lets every N-th batch through a skeleton of its own. The first process alone sums, changes and writes: it
gets the inputs of a layer in the order of the batches, so all its sums are those of a process that is alone, to the
bit. Inputs are sent and not sums, since a product adds to a sum in an order of its own. What the first process changes
goes to the others with its next order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from llmq import environment, processes, together
from llmq.text.attention import tiled
from llmq.text.passes import Passes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.hooks import RemovableHandle

    from llmq.text.skeleton import Skeleton
    from llmq.types import Loaded

Windows = Sequence[Sequence[int]]  # token ids (windows, tokens)
Heard = list[tuple[str, "Tensor"]]
"""Layers and their inputs `(..., features)`, in the order in which one batch reached them."""
AT_ONCE = 4
"""Batches of each process whose inputs are sent together: more take more memory, and fewer wait more often."""


@dataclass(frozen=True)
class Order:
    """What every process does next with its batches `first` to `last`: go on to the next wait, or rehearse a block."""

    block: str
    """The block that must be loaded; "" for none."""
    changed: Mapping[str, Tensor]
    """What the first process has set since its last order."""
    layers: frozenset[str]
    """The layers whose inputs are told, and before which a pass that goes on waits."""
    rehearsed: bool
    first: int
    last: int


class Batches:
    """The batches of this process. `on_input(layer, inputs)` hears the inputs of the linear layers of a block."""

    def __init__(self, source: Skeleton, batches: Sequence[Windows], share: together.Share | None = None):
        self.source, self.all = source, batches
        self.is_shared = share is None and together.are_led() and len(batches) > 1
        share = share or together.Share(0, processes.count() if self.is_shared else 1)
        self.passes = Passes(self._run, list(share.of(batches)))
        self.on_input: Callable[[str, Tensor], None] = _ignore
        self.block = ""
        self.changed: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __bool__(self) -> bool:
        return bool(self.all)

    @contextmanager
    def started(self) -> Iterator[None]:
        """All batches started, in every process, each waiting before the first block."""
        again = partial(type(self.source), self.source.folder, self.source.dtype_name)
        self._ask(partial(_begun, again, self.source.device, self.all), _nothing)
        try:
            with self._started():
                yield
        except Exception:  # an interrupt instead ends this process, and the launcher then ends the others
            self._ask(_ended, _nothing)
            raise
        self._ask(_ended, _nothing)

    @contextmanager
    def _started(self) -> Iterator[None]:
        module = self.source.module
        self.source.load_outside()
        for block in self.source.blocks:
            self.passes.wait_before(module.get_submodule(block))
        module.get_submodule(self.source.head).forward = self._arrive_at_head
        with tiled(module), self.passes.started():
            yield

    def _run(self, batch: Windows) -> None:
        self.source.module(input_ids=torch.tensor(batch, device=self.source.device), use_cache=False)

    def _arrive_at_head(self, inputs: Tensor) -> None:
        self.passes.wait()
        self.on_input(self.source.head, inputs)
        self.passes.wait()  # for good: nobody needs the logits

    def enter(self, block: str) -> None:
        """Load a block and hear its linear layers; the block before leaves memory. "" for none."""
        for hook in self._hooks:
            hook.remove()
        if self.block:
            self.source.free(self.block)
            environment.trim(self.source.device)  # or freed pieces between living ones would add up, block after block
        self.block = block
        if block:
            self.source.load(block)
        linears = self.source.linears(block) if block else {}
        self._hooks = [m.register_forward_pre_hook(partial(self._hook, name)) for name, m in linears.items()]

    def _hook(self, layer: str, module: Module, args: tuple[Tensor, ...]) -> None:
        self.on_input(layer, args[0])

    def set(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in a parameter's place, in every process."""
        self.source.set(name, tensor)
        if self.is_shared:
            self.changed[name] = tensor

    def block_changed(self) -> None:
        """Note that any tensor of the block may have changed in this process."""
        if self.is_shared:
            self.changed |= self.source.held(self.block)

    def rehearsed(self, on_input: Callable[[str, Tensor], None]) -> Tensor | tuple[Tensor, ...]:
        """The output of the block for the first batch, which this process has."""
        self.on_input = on_input
        output = next(self.passes.rehearse(slice(1)))
        self.on_input = _ignore
        return output

    def resume(self) -> None:
        """Let all batches go on to the next wait."""
        self.hear((), _ignore)

    def hear(self, layers: Collection[str], add: Callable[[str, Tensor], None], rehearsed: bool = False) -> None:
        """Call `add(layer, inputs)` for the inputs of layers, batch by batch in order.

        The passes then wait before these layers; `rehearsed` they go through the block, and come back.
        """
        if not self.is_shared:
            self._go(slice(None), layers, add, rehearsed)
            return
        most = -(-len(self.all) // processes.count())  # batches of a process
        for first in range(0, most, AT_ONCE if layers else most):
            last = first + (AT_ONCE if layers else most)
            order = Order(self.block, self.changed, frozenset(layers), rehearsed, first, last)
            self.changed = {}
            for heard in self._ask(partial(_obeyed, order), partial(self.heard, order)):
                for layer, inputs in heard:
                    add(layer, inputs.to(self.source.device))

    def _ask(self, work: together.Work[Heard], own: Callable[[together.Share], Mapping[int, Heard]]) -> list[Heard]:
        return together.answers_of(work, [], own) if self.is_shared else []

    def _go(self, some: slice, layers: Collection[str], add: Callable[[str, Tensor], None], rehearsed: bool) -> None:
        def note(layer: str, inputs: Tensor) -> None:
            if layer in layers:
                add(layer, inputs)
                if not rehearsed:
                    self.passes.wait()

        self.on_input = note
        if rehearsed:
            for _ in self.passes.rehearse(some):
                pass
        else:
            self.passes.resume(some)
        self.on_input = _ignore

    def heard(self, order: Order, share: together.Share) -> dict[int, Heard]:
        """The inputs that the batches of an order reach in this process, by their place among those of all."""
        found: dict[int, Heard] = {}
        for i in range(order.first, min(order.last, len(self.passes))):
            inputs: Heard = []

            def keep(layer: str, each: Tensor, inputs: Heard = inputs) -> None:
                # A copy, since what comes after may write in its place, and a view would be sent with all it looks at.
                inputs.append((layer, each.to("cpu" if share.process else each.device, copy=True)))

            self._go(slice(i, i + 1), order.layers, keep, order.rehearsed)
            found[(i - order.first) * share.processes + share.process] = inputs
        return found

    def obey(self, order: Order) -> None:
        """Bring the skeleton of this process to where that of the first process is."""
        if order.block != self.block:
            self.enter(order.block)
        for name, tensor in order.changed.items():
            self.source.set(name, tensor.to(self.source.device))


_under_way: list[tuple[Batches, ExitStack]] = []
"""The batches of this process, if it is not the first, and what ends them."""


def _begun(
    skeleton: Callable[[str], Skeleton],
    device: str,
    batches: Sequence[Windows],
    models: Sequence[Loaded],
    share: together.Share,
) -> dict[int, Heard]:
    started = Batches(skeleton(environment.own_device(device)), batches, share)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(started._started())
        _under_way.append((started, stack.pop_all()))
    return {}


def _obeyed(order: Order, models: Sequence[Loaded], share: together.Share) -> dict[int, Heard]:
    batches, _ = _under_way[-1]
    batches.obey(order)
    return batches.heard(order, share)


def _ended(models: Sequence[Loaded], share: together.Share) -> dict[int, Heard]:
    while _under_way:
        _under_way.pop()[1].close()
    return {}


def _nothing(share: together.Share) -> dict[int, Heard]:
    return {}


def _ignore(layer: str, inputs: Tensor) -> None:
    pass
