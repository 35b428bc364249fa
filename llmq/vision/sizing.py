"""Image models foretold: the network is built with random weights, and one pass of it is counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, cast

from llmq.sketch import Kind, Part, Sketch, Trial, Unit, Work, times

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.types import Expected
    from llmq.vision.family import ImageModel, Training

OPENED = 0.1
"""Seconds that opening a stage takes besides reading its file."""
STATES = {"adam": 2, "adamw": 2, "sgd": 1}
"""Numbers that an optimizer keeps beside each weight."""
GRAPH_RATE = 2.0
"""The rate of an exported graph's products, against convolutions of PyTorch; of int8 ones twice as much again."""
GRAPH_NODE = 440
"""Bytes that describe one layer in a graph's XML, its ranges included."""
MOST_LAYERS = 250
"""Layers of a network that is exported in order to be foretold, which takes about a second for 100."""
LOOP = 8_000_000
"""Bytes that a training takes besides: images, and a file that is written and read back."""
MOST = 1e10
"""Operations of a trial, which takes fewer images than the work if those need more."""
SCORED, LEARNED = 3e-7, 1.3e-7
"""Seconds a pixel of an image that a task prepares and scores, and of one that is prepared for a training."""
DRAWN, KEPT = 0.4, 0.5
"""Seconds of a task for its pictures, and of a training for its checkpoints and for opening what it saved."""


@dataclass(frozen=True)
class Pass:
    """One pass of one image: operations, the most bytes alive, the bytes kept for a backward pass, and layers."""

    operations: float
    live: int
    saved: int
    layers: int
    pixels: int
    axes: int = 2
    """3 for a network of volumes."""


@dataclass(frozen=True)
class ImageSketch(Sketch):
    """A stage of an image model, with a network of its shapes and random weights."""

    model: ImageModel | None = None
    network: Module | None = None
    counted: Pass = Pass(0.0, 0, 0, 0, 1)
    bits: int = 32
    constants: int = 0
    """The bytes of the constants of an exported graph; 0 where they are told by the parts."""
    tried_in: str = "torch"
    """The runtime that `network` runs in here, when its rate is told."""
    node_text: float = 0.0
    """The bytes that describe a node in the file of a graph that somebody exported; 0 for a graph of ours."""

    @property
    def in_memory(self) -> int:
        return self.constants or super().in_memory

    def timed(self, prompt_tokens: int, new_tokens: int, batch_size: int) -> Work:
        """One batch through the network."""
        return replace(forward(self, batch_size, batch_size), memory=working(self, batch_size))

    def with_files(self, size: int) -> ImageSketch:
        """The same with files of `size` bytes."""
        return replace(self, more_on_disk=self.more_on_disk + size - self.on_disk)

    def changed(self, change: Callable[[Module], None]) -> ImageSketch:
        """The sketch of the network after a change of its shapes."""
        network = copy.deepcopy(self.network)
        assert network is not None
        assert self.model is not None
        change(network)
        return drawn(self.model, network)


def as_images(sketch: Sketch) -> ImageSketch:
    """The sketch of an image model, which the steps and tasks of image models get."""
    return cast(ImageSketch, sketch)


def sketch_of(model: ImageModel) -> ImageSketch:
    """The sketch of a family's network. Raises `UserError` for settings that make none."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        resolved = model.resolved()
        return drawn(resolved, resolved.network().eval())


def drawn(model: ImageModel, network: Module) -> ImageSketch:
    """The sketch of a network: its tensors as they are saved, and one pass counted."""
    parts = []
    for name, tensor in network.state_dict().items():
        part = Part.plain(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        parts.append(part if _counts(network, name) else replace(part, role="buffer"))
    return ImageSketch(tuple(parts), "float32", model=model, network=network, counted=_counted(model, network))


def _counts(network: Module, name: str) -> bool:
    return name in {n for n, _ in network.named_parameters()}


def _counted(model: ImageModel, network: Module) -> Pass:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    inputs = model.example(1)
    live, kept, layers = 0, dict[int, int](), 0

    def note(module: Module, given: object, made: Any) -> None:
        nonlocal live, layers
        layers += 1
        live = max(live, sum(t.nbytes for t in _tensors((given, made))))

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # or its memory might be used for the next one
        return tensor

    alive: list[Tensor] = []
    leaves = [m for m in network.modules() if not list(m.children())]
    hooks = [m.register_forward_hook(note) for m in leaves]
    try:
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    weights = {t.untyped_storage().data_ptr() for t in network.state_dict().values()}
    saved = sum(size for place, size in kept.items() if place not in weights)
    pixels = prod(inputs.shape[2:]) if inputs.ndim >= 4 and inputs.shape[-1] > 1 else 1
    return Pass(float(counter.get_total_flops()), live, saved, layers, pixels, max(2, inputs.ndim - 2))


def _tensors(value: object) -> list[Tensor]:
    from torch import Tensor

    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def forward(sketch: ImageSketch, images: float, batch: int = 1) -> Work:
    """Passes over `images` of the usual size, `batch` at a time."""
    rate = (1.0 if sketch.runtime == sketch.tried_in else GRAPH_RATE) * (2 if sketch.bits == 8 else 1)
    operations: dict[Kind, float] = {_pass(sketch, batch): sketch.counted.operations * images / rate}
    return Work(sketch.in_memory + sketch.counted.live, operations)


def _pass(sketch: ImageSketch, batch: int) -> Trial:
    """A pass of the network itself."""
    count = max(1, min(batch, int(MOST / max(1.0, sketch.counted.operations))))

    def unit(device: str) -> Unit:
        import torch

        network, inputs = _of(sketch, count, device)

        def run() -> None:
            with torch.inference_mode():
                network(inputs)

        return run, sketch.counted.operations * count

    return Trial(f"{_name(sketch)} x{count}", unit)


def _step(sketch: ImageSketch, settings: Training, crop: int | None, halved: bool) -> Trial:
    """A pass of the network and back; the rate counts the operations forwards."""
    axes = sketch.counted.axes
    share = crop**axes / sketch.counted.pixels if crop else 1.0
    most = int(MOST / max(1.0, 3 * sketch.counted.operations * share))
    count = min(settings.batch_size, max(2, most))  # a norm over a batch needs two

    def unit(device: str) -> Unit:
        import torch

        network, inputs = _of(sketch, count, device)
        network = copy.deepcopy(network).train()
        if crop:
            for axis in range(-axes, 0):
                inputs = inputs.narrow(axis, 0, min(crop, inputs.shape[axis]))
            inputs = inputs.contiguous()
        if settings.channels_last and inputs.ndim == 4:
            order = torch.channels_last
            network, inputs = network.to(memory_format=order), inputs.to(memory_format=order)

        def run() -> None:
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=halved):
                made = network(inputs)
            torch.stack([each.float().mean() for each in _tensors(made)]).sum().backward()  # type: ignore[no-untyped-call]

        return run, sketch.counted.operations * share * count

    told = f"{' of' + str(crop) if crop else ''}{' bfloat16' if halved else ''}"
    return Trial(f"{_name(sketch)} x{count}{told} and backwards", unit)


def _name(sketch: ImageSketch) -> str:
    assert sketch.model is not None
    return f"{sketch.model.title} of {sketch.counted.operations / 1e6:.2f}M"


def _of(sketch: ImageSketch, count: int, device: str) -> tuple[Module, Tensor]:
    assert sketch.network is not None
    assert sketch.model is not None
    return sketch.network.to(device), sketch.model.example(count).to(device)


REORDERED, RUNTIME = 0.8, 6_500_000
"""Weights that kernels hold a second time in an order of their own, as a share; bytes of the runtime of a graph."""


def working(sketch: ImageSketch, images: float) -> int:
    """The bytes of an open stage that answers about some images at once."""
    held = int(sketch.in_memory * (1 + REORDERED))
    if sketch.runtime != "torch":
        return RUNTIME + held + int(2 * sketch.counted.live * images * min(sketch.bits, 32) / 32)
    return held + int(2 * sketch.counted.live * images)


def opening(sketch: ImageSketch) -> Work:
    return Work(sketch.in_memory, {"copy": 4.0 * sketch.in_memory}, OPENED)


def training(sketch: ImageSketch, settings: Training, crop: int | None) -> Work:
    """All steps of a training, in float32 or with products in bfloat16."""
    import torch

    from llmq.matrix.products import lacks_bfloat16

    share = (crop**sketch.counted.axes / sketch.counted.pixels if crop else 1.0) * settings.batch_size
    halved = settings.autocast and (torch.cuda.is_available() or not lacks_bfloat16())
    width = 0.5 if halved else 1.0
    states = STATES[settings.optim]
    memory = (
        LOOP + sketch.in_memory * (2 + states) + int((sketch.counted.saved * width + 2 * sketch.counted.live) * share)
    )
    step: dict[Kind, float] = {_step(sketch, settings, crop, halved): sketch.counted.operations * share}
    step["copy"] = (6.0 + 8.0 * states) * sketch.in_memory
    work = times(Work(memory, step, disk=2 * sketch.in_memory * (1 + states)), settings.max_steps)
    return replace(work, seconds=KEPT + LEARNED * sketch.counted.pixels * share * settings.max_steps)


def as_graph(sketch: ImageSketch, bits: int, activations: bool = False) -> ImageSketch:
    """The exported graph, with matrices of `bits`, and with ranges of `activations` if these are rounded, too.

    The text that describes the graph is only estimated.
    """
    from llmq.sketch import BYTES

    dtype = {4: "int8", 8: "int8", 16: "float16", 32: "float32"}[bits]
    network = sketch.network
    assert network is not None
    parts = []
    for part in sketch.parts:
        if part.role == "buffer":  # folded into the matrices
            continue
        own = dtype if len(part.shape) > 1 else "float32"
        graph = Part.plain(part.name, part.shape, own, part.role)
        parts.append(replace(graph, packed=bits < 32 and len(part.shape) > 1, stored=graph.stored))
    held = sum(part.weights * BYTES[part.stored[0].dtype] for part in parts)
    files, constants = _exported(sketch, bits, activations)
    made = replace(sketch, parts=tuple(parts), runtime="openvino", bits=max(bits, 8), constants=constants)
    described = GRAPH_NODE * sketch.counted.layers * (4 if bits <= 8 else 2)
    told = replace(made, not_in_order="the text that describes a graph is estimated")
    return told.with_files(files or held + described)


def _exported(sketch: ImageSketch, bits: int, activations: bool) -> tuple[int, int]:
    """The bytes of the files and the constants of the exported graph; 0 for a network that is not exported soon."""
    from llmq.errors import LlmqError
    from llmq.vision.graph_sizing import graph_bytes

    assert sketch.model is not None
    assert sketch.network is not None
    if sketch.counted.layers > MOST_LAYERS:
        return 0, 0
    try:
        return graph_bytes(sketch.model, sketch.network, bits, activations, sketch.node_text)
    except (LlmqError, RuntimeError):
        return 0, 0


SCORING = 10_000_000
"""Bytes that scoring takes besides the network and the images: scores, pictures."""


def asked(
    stage: Sketch, expected: Expected | None, limit: int | None, batch: int, assumed: int = 0, scoring: int = SCORING
) -> Work:
    """Passes over the held-out images that data is expected to have, or `assumed` many; `batch` at a time.

    `scoring` are the bytes that scores and pictures take.
    """
    sketch = as_images(stage)
    known = [n for n in (limit, expected.held_out if expected else None, assumed) if n]
    share = expected.pixels / sketch.counted.pixels if expected and expected.pixels else 1.0
    images = min(known, default=0)
    work = forward(sketch, images * share, batch)
    pixels = expected.pixels if expected and expected.pixels else sketch.counted.pixels
    read = images * pixels * _channels(sketch)  # a byte each; all are there at once
    memory = scoring + read + working(sketch, share * min(batch, images or batch))
    unknown = "" if images else "the images are counted when the data is read; set limit"
    return replace(work, memory=memory, seconds=DRAWN + SCORED * pixels * images, unknown=unknown)


def _channels(sketch: ImageSketch) -> int:
    """The channels of the images that a network is asked about; none of latents."""
    assert sketch.model is not None
    shape = sketch.model.example(1).shape
    return int(shape[1]) if len(shape) >= 4 and shape[-1] > 1 else 0


def beside(ours: Work, theirs: Work) -> Work:
    """The work of both, one after the other, with both open, each with the memory that its passes took."""
    both = ours.plus(theirs)
    return replace(both, memory=both.memory + max(min(ours.memory, theirs.memory) - SCORING, 0))


EXPORTING = 4.0
"""Seconds that exporting takes in a process of its own, most of them to load libraries; 4 to 5 for small networks."""


def exporting(source: ImageSketch, made: ImageSketch, inputs: int = 0, expected: Expected | None = None) -> Work:
    """Tracing and writing a graph, and passes over the inputs that it is calibrated and corrected on.

    Of the data no more inputs come than it is `expected` to have, each in its own size.
    """
    share = expected.pixels / source.counted.pixels if expected and expected.pixels else 1.0
    inputs = min(inputs, expected.train or inputs) if expected else inputs
    passes = forward(source, 4 * inputs * share)
    # Its memory is not known: it is that of another process.
    return replace(passes, seconds=passes.seconds + EXPORTING, memory=0)
