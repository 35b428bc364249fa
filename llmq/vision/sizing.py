"""Image models foretold: the network is built with random weights, and one pass of it is counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, cast

from llmq.sketch import Part, Sketch, Work, times

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.types import Expected
    from llmq.vision.family import ImageModel, Training

OPENED = 0.1
"""Seconds that opening a stage takes besides reading its file."""
OVERHEAD = 3e-5
"""Seconds that each layer takes besides its products, forward and backward."""
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
STEP_SECONDS, LEARNED_SECONDS, ASKED_SECONDS = 0.01, 0.0015, 0.008
"""Seconds besides the network, of a training step, of each image in it, and of each image that a task looks at."""


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

    def timed(self, prompt_tokens: int, new_tokens: int, batch_size: int) -> Work:
        """One batch through the network."""
        return replace(forward(self, batch_size), memory=working(self, batch_size))

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

    def note(module: Module, given: Any, made: Any) -> None:
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


def _tensors(value: Any) -> list[Tensor]:
    from torch import Tensor

    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def forward(sketch: ImageSketch, images: float, dtype: str = "float32") -> Work:
    """Passes over `images` of the usual size, one at a time."""
    rate = 1.0 if sketch.runtime == "torch" else GRAPH_RATE * (2 if sketch.bits == 8 else 1)
    operations = {f"conv-{dtype}": sketch.counted.operations / rate, "copy": 3.0 * sketch.counted.saved / rate}
    overhead = sketch.counted.layers * OVERHEAD / rate
    work = times(Work(sketch.in_memory + sketch.counted.live, operations), images)
    return replace(work, seconds=overhead * images)


REORDERED, RUNTIME = 0.8, 6_500_000
"""Weights that kernels hold a second time in an order of their own, as a share; bytes of the runtime of a graph."""


def working(sketch: ImageSketch, images: float) -> int:
    """The bytes of an open stage that answers about some images at once."""
    held = int(sketch.in_memory * (1 + REORDERED))
    if sketch.runtime != "torch":
        return RUNTIME + held  # activations share the memory that the runtime has
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
    dtype = "bfloat16" if halved else "float32"
    # The backward pass takes two products for each one of the pass: of the weights, and of the inputs.
    step = {f"conv-{dtype}": 3.0 * sketch.counted.operations * share, "copy": 9.0 * sketch.counted.saved * share}
    step["copy"] += 6.0 * sketch.in_memory
    seconds = STEP_SECONDS + LEARNED_SECONDS * settings.batch_size + 3 * sketch.counted.layers * OVERHEAD
    work = times(Work(memory, step, disk=2 * sketch.in_memory * (1 + states)), settings.max_steps)
    return replace(work, seconds=seconds * settings.max_steps)


def as_graph(sketch: ImageSketch, bits: int, activations: bool = False) -> ImageSketch:
    """The exported graph, with matrices of `bits`, and with ranges of `activations` if these are rounded, too.

    The text that describes the graph is only estimated.
    """
    from llmq.sketch import BYTES

    dtype = {8: "int8", 16: "float16", 32: "float32"}[bits]
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
    made = replace(sketch, parts=tuple(parts), runtime="openvino", bits=bits)
    described = GRAPH_NODE * sketch.counted.layers * (4 if bits == 8 else 2)
    files = _exported(sketch, bits, activations) or held + described
    return replace(made, more_on_disk=files - made.on_disk, not_in_order="the text that describes a graph is estimated")


def _exported(sketch: ImageSketch, bits: int, activations: bool) -> int:
    """The bytes of the files of the exported graph; 0 for a network that is not exported, or not soon."""
    from llmq.errors import LlmqError
    from llmq.vision.graph_sizing import graph_bytes

    assert sketch.model is not None
    assert sketch.network is not None
    if sketch.counted.layers > MOST_LAYERS:
        return 0
    try:
        return graph_bytes(sketch.model, sketch.network, bits, activations)
    except (LlmqError, RuntimeError):
        return 0


SCORING = 10_000_000
"""Bytes that scoring takes besides the network: images, scores, pictures."""


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
    work = forward(sketch, images * share)
    memory = scoring + working(sketch, share * min(batch, images or batch))
    unknown = "" if images else "the images are counted when the data is read; set limit"
    return replace(work, memory=memory, seconds=work.seconds + ASKED_SECONDS * images, unknown=unknown)


def beside(stage: Sketch, base: Sketch, ours: Work, theirs: Work) -> Work:
    """The work of both, one after the other, with both open."""
    both = ours.plus(theirs)
    return replace(both, memory=both.memory + min(stage.in_memory, base.in_memory))


EXPORTING = 12.0
"""Seconds that exporting takes in a process of its own, libraries included."""


def exporting(source: ImageSketch, made: ImageSketch, inputs: int) -> Work:
    """Tracing and writing a graph, and passes over the inputs that it is calibrated and corrected on."""
    passes = forward(source, 4 * inputs)
    # Its memory is not known: it is that of another process.
    return replace(passes, seconds=passes.seconds + EXPORTING, memory=0)
