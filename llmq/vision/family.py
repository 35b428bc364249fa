"""The base of the families of image models: weights at rest, opening, timing, and the settings of a training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field

from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.files import at_home, cache, make_whole, sha256_files, sha256_text
from llmq.guarded.weights import safetensors_of
from llmq.matrix.products import lacks_bfloat16
from llmq.plugin import KindsOf
from llmq.types import Clock, Context, Data, Loaded, Model, Reading, Split, Step, Workload
from llmq.vision.images import Example

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator
    from torch import Tensor
    from torch.nn import Module

    from llmq.layers import LayerChange
    from llmq.vision.matrices import Matrices
    from llmq.vision.sizing import ImageSketch

T = TypeVar("T")
Batch = dict[str, Any]
"""The tensors of a batch by name; a detector's targets are a list of such dicts, one for each image."""
NOTED = (
    "batch_size", "learning_rate", "optim", "weight_decay", "augment", "autocast", "channels_last", "seed", "loss_unit"
)  # fmt: skip
"""The settings of a training that a stage notes."""


@dataclass(frozen=True)
class Training:
    """The settings of a training: a family gives defaults, and a step overrides them by those of a recipe."""

    batch_size: int
    learning_rate: float  # the peak, after the warm-up
    loss_unit: str  # for the report, such as "nats"
    optim: Literal["adam", "adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam and AdamW
    weight_decay: float = 0.0
    augment: Literal["none", "flip", "dihedral"] = "none"
    autocast: bool = False
    """Matrix products in bfloat16, for families that were measured to train as well so, and faster in hardware."""
    channels_last: bool = False  # the order in memory: (n, height, width, channels)
    max_steps: int = 0  # set by `lasting`
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    max_grad_norm: float | None = None  # None: gradients are not clipped
    crop: int | None = None  # the side of random squares, in pixels
    eval_steps: int = 0  # between two held-out figures
    save_steps: int = 0  # between two checkpoints
    seed: int = 0
    keep_sparsity: bool = False
    """True keeps at zero, after every step, the weights that were zero when the training began."""

    def set_by(self, step: Step[Any], artifact: Artifact[Any], context: Context) -> "Training":
        """These settings as a run has them, overridden by the settings of the step that have the same names."""
        pruned = "prune.magnitude" in artifact.history  # then training must not fill the zeros
        slow = context.device == "cpu" and lacks_bfloat16()  # then float32 trains at several times the speed
        as_run = replace(self, seed=context.seed, keep_sparsity=pruned, autocast=self.autocast and not slow)
        return as_run.overridden(step)

    def overridden(self, step: Step[Any]) -> "Training":
        """These settings, overridden by the settings of the step that have the same names."""
        told = {f.name: value for f in fields(self) if (value := getattr(step, f.name, None)) is not None}
        return replace(self, **told)

    def noted(self) -> dict[str, object]:
        """What a stage notes of them."""
        return {name: getattr(self, name) for name in NOTED}

    def lasting(self, steps: int, warmup_ratio: float) -> "Training":
        """These settings for `steps` steps; unless set, held-out figures and checkpoints come every quarter of them."""
        quarter = max(1, steps // 4)
        return replace(
            self,
            max_steps=steps,
            warmup_steps=round(warmup_ratio * steps),
            eval_steps=self.eval_steps or quarter,
            save_steps=self.save_steps or quarter,
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)  # 0 to 1
        factors = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.learning_rate * factors[self.lr_scheduler_type]


def fewer_at_once(batch_size: int) -> Iterator[Mapping[str, object]]:
    """Settings that take less memory, the next one first."""
    yield from ({"batch_size": batch_size // n} for n in (2, 4, 8, 16) if batch_size >= 2 * n)


@dataclass(frozen=True)
class Learner:
    """A module to train, and the loss of a batch that the training lowers."""

    name: str
    module: "Module"
    loss: Callable[[Batch], "Tensor"]


class ImageModel(Model):
    """A family of image models. A run calls these methods in this order; a family defines those with a star.

    Before anything is loaded:  `check`
    Weights at rest (`base`):   `resolved`, `source`, `network`*, `pretrained`
    Opened (`open`):            `prepare`*
    Data:                       `check_split`, `check_images`, `numbered`, `not_watchable`
    Training:                   `learners`*, `batch`*, `validate_on`*
    Compression and export:     `skeleton`, `rewrite`, `example`*, `calibration`, `deployed`
    Comparison and timing:      `probe`, `clocks`
    Use:                        `predictor`*

    The network maps one float tensor to a tensor or to a tuple of tensors, so that a graph can be exported. The
    rest (boxes from scores, pixels from numbers) belongs to the family and is computed in float32.
    """

    training: ClassVar[Training]
    shapes: ClassVar[frozenset[str]] = frozenset()
    """The shapes of examples that the network learns from; empty for any."""
    any_size: ClassVar[bool] = False
    """True if the network, and so the exported graph, takes images of any height and width."""
    watched_from: ClassVar[int] = 1
    """The fewest held-out examples that give the figure shown while training."""

    weights: str | None = Field(
        None, description="a .safetensors file, a folder with model.safetensors, or a built-in word; random if unset"
    )

    @property
    def unordered(self) -> bool:
        """True if the rows of all outputs share one order that has no meaning, such as the queries of a detector."""
        return False

    @property
    def two_stages(self) -> bool:
        """True if later layers run on the objects that earlier ones find: PyTorch's own exporter writes such a network
        as ONNX, for one image at a time."""
        return False

    @property
    def floats(self) -> tuple[str, ...]:
        """The layers that int8 leaves in float where no step says another: names, or their beginnings."""
        return ()

    @property
    def cropped(self) -> int | None:
        """The side of the squares that a training cuts out of images where no step says another; None: whole images."""
        return None

    @property
    def title(self) -> str:
        """The family and the network, for messages: `models.timm_classifier resnet18`."""
        kind = (getattr(self, "config", None) or {}).get("model_type")
        return " ".join(filter(None, (self.word, getattr(self, "architecture", None) or kind or self.weights)))

    def check(self) -> None:
        """Raise `UserError` for weights that do not exist or cannot be opened."""
        if self.weights is not None:
            from llmq.vision.state import check_weights

            check_weights(self.weights)

    def resolved(self) -> Self:
        """These settings, completed from the weights, so that later stages need nothing else."""
        return self

    def source(self) -> str:
        """The origin of the weights; other weights have another one."""
        if self.weights is None:
            return "random weights"
        path = at_home(self.weights)
        return f"{self.weights} {sha256_files(safetensors_of(path) if path.is_dir() else [path])[:16]}"

    def network(self) -> "Module":
        """The network of these settings with random weights, float32."""
        raise NotImplementedError

    def pretrained(self) -> "Mapping[str, Tensor] | None":
        """The tensors of `weights` under the names in the network; None for random weights."""
        if self.weights is None:
            return None
        from llmq.vision.state import read_state

        return read_state(self.weights)

    def sketch(self) -> "ImageSketch":
        """The network, built with random weights, and one pass of it counted."""
        from llmq.vision.sizing import sketch_of

        return sketch_of(self)

    def base(self, context: Context) -> Artifact[Self]:
        """The network at rest in the cache, with the given weights, or with random ones under the run's seed."""
        import torch

        model = self.resolved()
        where = model.source()
        # The key of the cache: the weights depend on nothing else.
        about = [type(model).__module__, model.model_dump_json(), where, str(context.seed), torch.__version__]
        folder = cache("models", f"{type(model).__name__.lower()}-{sha256_text(*about)[:16]}")
        make_whole(folder, partial(model._fill, seed=context.seed), shared=True)
        note = where if model.weights else f"{where}, seed {context.seed}"
        if getattr(model, "new_head", False):
            note += ", but for the last layer, which is new"
        return Artifact(model, folder, notes={"source": note})

    def _fill(self, folder: Path, seed: int) -> None:
        import torch

        from llmq.vision.state import load_strictly, save_network

        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as they were
            torch.manual_seed(seed)
            network, given = self.network(), self.pretrained()
        if given is not None:
            load_strictly(network, given, str(self.weights))
        save_network(network, folder)

    def open(self, artifact: Artifact, device: str) -> Loaded:
        """The network in evaluation mode, or the exported graph, which runs on the processor for any `device`.

        The `processor` of the result turns images into the network's input.
        """
        if artifact.runtime == "openvino":
            from llmq.guarded.graphs import check_graph
            from llmq.openvino_runtime import DEVICE, GRAPH
            from llmq.vision.apart import check_opens
            from llmq.vision.exported import ExportedModule

            check_graph(artifact.weights / GRAPH)  # a truncated file would crash OpenVINO
            check_opens(artifact.weights, self.title, self.example(1))
            return Loaded(ExportedModule(artifact.weights), self.prepare, DEVICE, artifact)
        if artifact.runtime == "onnx":
            from llmq.openvino_runtime import DEVICE
            from llmq.vision.onnx.module import OnnxModule

            return Loaded(OnnxModule(artifact.weights), self.prepare, DEVICE, artifact)
        from llmq.vision.state import open_network

        return Loaded(open_network(self.network(), artifact.weights).eval().to(device), self.prepare, device, artifact)

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        """Turn uint8 images `(height, width, channels)` into the float input `(n, channels, height, width)`."""
        raise NotImplementedError

    def check_split(self, split: Split) -> None:
        """Raise `UserError` for data that this network can neither learn from nor be evaluated on."""
        self.check_images(split)

    def check_images(self, split: Split) -> None:
        """Raise `UserError` for images that this network cannot take; labels do not matter."""
        if self.shapes:
            the_shape(split, " or ".join(sorted(self.shapes)), self.word)

    def check_training(
        self, data: Data, crop: int | None, watched: int, shown: Callable[[Sequence[Example]], Sequence[Example]]
    ) -> None:
        """Raise `UserError` for data from which this network cannot learn, `shown` as that gives them.

        `watched` is the number of held-out examples that give a figure while training.
        """
        import numpy as np

        split = data.read()
        self.check_split(split)
        if not len(split.train):
            raise UserError(f"the training part of {data.word} is empty; hold less out")
        # A batch of one example shows whether the family can learn from the labels, the channels, the crop.
        self.batch(shown(self.numbered(split).train[:1]), np.random.default_rng(0), "none", crop)
        if len(held_out := split.held_out[:watched]) and (lacks := self.not_watchable(held_out)):
            raise UserError(f"{lacks} to watch the training; hold more out, or set held_out_examples: 0")

    def names(self) -> tuple[tuple[str, ...], ...]:
        """The names of each output, the plainest last; empty if the outputs have no names."""
        return ()

    def numbered(self, split: Split) -> Split:
        """The split with labels numbered as the network numbers them."""
        return split

    def not_watchable(self, examples: Sequence[Example]) -> str:
        """The reason why these held-out examples give no figure while training; empty if they give one."""
        if len(examples) >= self.watched_from:
            return ""
        return f"{len(examples)} held-out example, and {self.watched_from} are needed"

    def learners(self, network: "Module") -> list[Learner]:
        """The modules that learn from a batch, one after the other: most families have the network alone, a GAN two."""
        raise NotImplementedError

    def batch(self, examples: Sequence[Example], rng: "Generator", augment: str, crop: int | None) -> Batch:
        """The tensors of a training batch."""
        raise NotImplementedError

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """The name and value of the held-out figure that is shown while training."""
        raise NotImplementedError

    def skeleton(self, artifact: Artifact, device: str) -> "Matrices":
        """The layers as matrices, for a step that changes weights."""
        from llmq.vision.matrices import Matrices
        from llmq.vision.state import open_network

        return Matrices(open_network(self.network(), artifact.weights).eval())

    def rewrite(
        self, source: "Matrices", folder: Path, change: "LayerChange[Any]", windows: object, sequential: bool
    ) -> list[str]:
        """Write the network with changed layers to `folder`; no layer needs a calibration, so `windows` is not read."""
        source.rewrite(folder, change)
        return []

    def example(self, batch_size: int) -> "Tensor":
        """An input of the usual size, for exporting and timing; every call gives the same numbers."""
        raise NotImplementedError

    def calibration(self, split: Split | None, samples: int, seed: int) -> "Iterable[Tensor]":
        """Calibration inputs of one image each: `samples` of the training images, drawn under a seed.

        Raises `UserError` where there is no data, or none that fits.
        """
        if split is None:
            raise UserError("it needs 'data' to calibrate on, such as the data that the network was trained on")
        self.check_images(split)
        import numpy as np

        rows = np.random.default_rng(seed).permutation(len(split.train))[:samples]  # each image at most once
        examples = ((int(row), split.train[int(row)]) for row in rows)
        return (self.prepare([each.drawn(np.random.default_rng([seed, row]))]) for row, each in examples)

    def deployed(self, network: "Module") -> "Module":
        """The network to export, which computes the same as `network` and may cost less."""
        return network

    def probe(self, module: "Module") -> "Sequence[Tensor]":
        import torch

        module.eval().to(memory_format=torch.contiguous_format)  # the order in files, on which sums depend
        with torch.inference_mode():
            answers = module(self.example(2).to(next(module.parameters(), torch.empty(0)).device))
        return [t.cpu() for t in as_tuple(answers)]

    def clocks(self, loaded: Loaded, workload: Workload) -> Iterable[Clock]:
        """One clock, which times one batch through the module."""
        from llmq.environment import where_it_runs

        inputs = self.example(workload.batch_size).to(loaded.device)
        size = "x".join(map(str, inputs.shape))
        # Each reading is made of the seconds of one batch.
        readings = (
            Reading("latency_p50", "ms", "lower", lambda s: 1000 * s),
            Reading("latency_p95", "ms", "lower", lambda s: 1000 * s, quantile=0.95),
            Reading("images_per_second", "images/s", "higher", lambda s: workload.batch_size / s),
        )
        protocol = f"input {size} float32, {where_it_runs(loaded)}"
        return [Clock(workload.task, partial(_run, loaded.module, inputs), readings, protocol, 3, workload.rounds)]


IMAGE_MODELS = KindsOf(ImageModel)
"""The value of `suits` for a step or a task that takes every image model."""


def _run(module: "Module", inputs: "Tensor") -> None:
    import torch

    with torch.inference_mode():
        module(inputs)


def as_tuple(outputs: "Tensor | Sequence[Tensor]") -> "tuple[Tensor, ...]":
    """The outputs of a network as a tuple, be it one or several."""
    from torch import Tensor

    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def noise(*shape: int) -> "Tensor":
    """Standard normal noise of a shape; every call gives the same numbers."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def in_batches(examples: Sequence[T], size: int) -> Iterable[list[T]]:
    """Lists of `size` examples; the last may be shorter."""
    return (list(examples[i : i + size]) for i in range(0, len(examples), size))


def the_shape(split: Split, wanted: str, word: str) -> Split:
    """Return `split` if its examples have a wanted shape. Raises `UserError` if not."""
    if split.shape not in wanted.split(" or "):
        raise UserError(f"{word}: its examples are {split.shape}, and {wanted} is needed")
    return split


def check_same(split: Split, sha256: str, word: str) -> None:
    """Raise `LlmqError` unless this process reads the data that the first one read."""
    if split.sha256 != sha256:
        raise LlmqError(f"{word}: this process reads other data than the first, sha256 {split.sha256[:12]}")


def varied(images: "Sequence[ndarray]", rng: "Generator", augment: str, side: int | None) -> "list[ndarray]":
    """The same random square of each image, mirrored (`flip`), or mirrored and turned by quarters (`dihedral`).

    `side` counts pixels of the first image; None gives whole images. The other images show the same scene, as large as
    the first or larger by a whole factor.
    """
    import numpy as np

    rows, columns = images[0].shape[:2]
    if side:
        side = min(side, rows, columns)
        top, left = (int(rng.integers(0, length - side + 1)) for length in (rows, columns))
        factors = [len(image) // rows for image in images]  # 1, and the scale of a high-resolution image
        images = [
            image[top * k : (top + side) * k, left * k : (left + side) * k]
            for image, k in zip(images, factors, strict=True)
        ]
    mirror = augment != "none" and rng.random() < 0.5
    turns = int(rng.integers(4)) if augment == "dihedral" else 0  # with the mirror, all eight of the square
    # torch takes no array with negative strides.
    return [np.ascontiguousarray(np.rot90(image[:, ::-1] if mirror else image, turns)) for image in images]
