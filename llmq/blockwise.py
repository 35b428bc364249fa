"""Changing a model block by block, with one block in memory.

The calibration batches go through the model in lockstep. Each is a forward pass of the model itself, suspended where a
layer is about to change until all the others have arrived there too; then the layer is changed, and they go on through
what became of it. So the model runs once, whatever its architecture; a later layer sees the work of the earlier ones;
and of a batch nothing is kept but what its own pass keeps. A finished block is a file, from which a killed job goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from greenlet import GreenletExit, getcurrent, greenlet

from llmq.attention import tiled
from llmq.calibration import Gathered
from llmq.errors import LlmqError, UserError
from llmq.files import write_json
from llmq.measure import trim
from llmq.models.reopened import written
from llmq.models.skeleton import Skeleton
from llmq.terminal import track

BATCH_TOKENS = 512
"""Tokens of a calibration batch: more take more memory, and are no faster."""
REHEARSE = "rehearse"


class Method(Protocol):
    """What is done to the layers of a model."""

    gathers: Literal["hessian", "squares"] | None

    def wants(self, layer: str) -> bool:
        """Whether it changes this layer."""

    def change(self, layers: Mapping[str, Any], gathered: Any) -> Mapping[str, Mapping[str, Any]]:
        """The tensors to keep for each of these layers, which share their input, from their weights."""

    def weight(self, layer: str, tensors: Mapping[str, Any]) -> Any:
        """The weight that the tensors kept for a layer stand for."""


def rewrite(
    source: Skeleton, folder: Path, method: Method, windows: Sequence[Sequence[int]] = (), sequential: bool = True
) -> list[str]:
    """Write `source` to `folder` with its layers changed, a safetensors file a block. Goes on where a kill left it.

    Returns the layers that no token of the calibration came to, as may be those of a rare expert.
    """
    import torch

    count = len(source.blocks) + 1
    files = [folder / f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    walk = Walk(source, method, windows, sequential)
    with torch.no_grad(), walk.under_way():
        for block, file in zip(track(source.blocks, "blocks"), files, strict=False):
            source.load(block)
            if file.exists():
                walk.go_through(block, file)
            else:
                write(source.as_in_files(walk.change_block(block)), file)
            source.free(block)
            trim(source.device)  # or freed pieces between living ones would add up, block after block
        if not files[-1].exists():
            head = walk.change_head()
            outside = dict(source.outside())
            if head:  # what shared the head's matrix is a matrix of its own from here on
                outside |= {name: source.tensor(its) for name, its in source.tied.items()}
                del outside[f"{source.head}.weight"]
            write(source.as_in_files(outside | head), files[-1])
    write_index(files)
    return walk.unseen


class Walk:
    """The calibration batches on their way through a model."""

    def __init__(self, source: Skeleton, method: Method, windows: Sequence[Sequence[int]], sequential: bool):
        self.source, self.method, self.sequential = source, method, sequential
        self.batches = in_batches(windows) if method.gathers else []
        self.passes: list[Any] = []
        self.on_input: Callable[[str, Any], None] = lambda layer, inputs: None
        self.unseen: list[str] = []
        self.known_groups: dict[tuple[str, ...], list[list[int]]] = {}

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """All batches begun, and waiting before the first block."""
        self.source.load_outside()
        for block in map(self.source.module.get_submodule, self.source.blocks):
            block.forward = partial(_when_told, block.forward)
        self.source.module.get_submodule(self.source.head).forward = self._arrive_at_head
        self.passes = [greenlet(partial(self._run, batch)) for batch in self.batches]
        with tiled(self.source.module):
            try:
                self._go_on()
                yield
            finally:
                for one in self.passes:
                    one.throw(GreenletExit)

    def _run(self, batch: Sequence[Sequence[int]], word: str) -> None:
        import torch

        self.source.module(input_ids=torch.tensor(batch, device=self.source.device), use_cache=False)

    def _arrive_at_head(self, inputs: Any) -> None:
        wait()
        self.on_input(self.source.head, inputs)
        wait()  # for ever: what the head would say is not needed

    def _go_on(self, word: str = "") -> None:
        for one in self.passes:
            one.switch(word)
            if one.dead:
                raise LlmqError("a calibration pass ended before the model's last block")

    def go_through(self, block: str, file: Path) -> None:
        """Go through a block that was changed before."""
        for layer in filter(self.method.wants, self.source.linears(block)):
            self._set(layer, self.source.kept(layer, file))
        self._go_on()

    def change_block(self, block: str) -> dict[str, Any]:
        """Change the layers of a loaded block and go through it; all of its tensors as they are to be kept."""
        linears = self.source.linears(block)
        wanted = list(filter(self.method.wants, linears))
        hooks = [m.register_forward_pre_hook(partial(self._hook, name)) for name, m in linears.items()]
        kept: dict[str, Any] = {}
        if not self.passes:
            for layer in wanted:
                kept |= self._change([layer], None)
        elif wanted:
            for group, sums in self._gather(self._groups(block, wanted)):
                kept |= self._change(group, sums)
        for hook in hooks:
            hook.remove()
        self._go_on()
        others = self.source.held(block).items()
        return {name: tensor for name, tensor in others if name.removesuffix(".weight") not in wanted} | kept

    def change_head(self) -> dict[str, Any]:
        """Change the output head where that is wanted, its inputs being all that is still to come."""
        head = self.source.head
        if not self.method.wants(head):
            return {}
        sums = next(self._gather([[head]]))[1] if self.passes else None
        return self._change([head], sums)

    def _hook(self, layer: str, module: Any, args: tuple[Any, ...]) -> None:
        self.on_input(layer, args[0])

    def _groups(self, block: str, wanted: Sequence[str]) -> list[list[str]]:
        """Layers that are given the same input, in the order they are reached, seen on a rehearsal of one batch."""
        seen: dict[Any, list[str]] = {}
        alive = []

        def note(layer: str, inputs: Any) -> None:
            alive.append(inputs)  # or its memory might be used for the next one
            # An expert that no token comes to has an input without memory: then the tensor itself tells.
            place = inputs.data_ptr() if inputs.numel() else id(inputs)
            seen.setdefault((place, inputs.shape, inputs._version), []).append(layer)

        signature = tuple(layer.removeprefix(block) for layer in wanted)
        if signature not in self.known_groups:
            self.on_input = note
            self.passes[0].switch(REHEARSE)
            groups = [[wanted.index(layer) for layer in group if layer in wanted] for group in seen.values()]
            missed = set(wanted).difference(*seen.values())
            if missed:
                name = min(missed)
                raise UserError(
                    f"{name} of {self.source.config.model_type} is not reached by the calibration, so its model reads "
                    f"the weight by itself; leave it out: modules: {{{name.rpartition('.')[2]}: skip}}"
                )
            self.known_groups[signature] = [group for group in groups if group]
        return [[wanted[i] for i in group] for group in self.known_groups[signature]]

    def _gather(self, groups: Sequence[Sequence[str]]) -> Iterator[tuple[Sequence[str], Any]]:
        """Each group with the sums over its inputs: in turn as they are reached, or all on one rehearsal."""
        sums = {group[0]: Gathered(self.method.gathers) for group in groups if self.method.gathers}

        def add(layer: str, inputs: Any) -> None:
            if layer in sums:
                sums[layer].add(inputs)
                if self.sequential:
                    wait()

        self.on_input = add
        if not self.sequential:
            self._go_on(REHEARSE)
            self.on_input = lambda layer, inputs: None
        for group in groups:
            if self.sequential:
                self._go_on()
            total = sums.pop(group[0]).total()
            self.unseen += group if not bool(total.any()) else ()
            yield group, total

    def _change(self, layers: Sequence[str], sums: Any) -> dict[str, Any]:
        weights = {layer: self.source.module.get_submodule(layer).weight.data for layer in layers}
        for layer, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise UserError(f"{layer}: its weights are not finite numbers; look at the model")
        try:
            changed = self.method.change(weights, sums)
        except UserError as error:
            raise UserError(f"{layers[0]}: {error}") from None
        for layer, tensors in changed.items():
            self._set(layer, tensors)
        return {f"{layer}.{name}": tensor for layer, tensors in changed.items() for name, tensor in tensors.items()}

    def _set(self, layer: str, tensors: Mapping[str, Any]) -> None:
        if self.passes:
            weight = self.method.weight(layer, tensors)
            self.source.set(f"{layer}.weight", weight.to(self.source.device, self.source.dtype).contiguous())


def in_batches(windows: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    """Windows, all of one length, in batches of about `BATCH_TOKENS`."""
    rows = max(1, BATCH_TOKENS // len(windows[0]))
    return [windows[i : i + rows] for i in range(0, len(windows), rows)]


def _when_told(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    while wait() == REHEARSE:
        forward(*args, **kwargs)
    return forward(*args, **kwargs)


def wait() -> Any:
    """Suspend this pass until it is told to go on; what it is told."""
    return getcurrent().parent.switch()


def write(tensors: Mapping[str, Any], file: Path) -> None:
    """Write a safetensors file in one step."""
    from safetensors.torch import save_file

    partial_file = file.with_name(f".{file.name}.partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial_file, {"format": "pt"})
    written(tensors, partial_file)
    partial_file.replace(file)


def write_index(files: Sequence[Path]) -> None:
    """The index beside safetensors files that says which tensor is where."""
    from safetensors import safe_open

    weight_map, total = {}, 0
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                weight_map[name] = file.name
                total += opened.get_tensor(name).nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(files[0].parent / "model.safetensors.index.json", index)
