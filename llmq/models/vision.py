"""What the families of image models share: random or given weights at rest, opening, timing, and how they learn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from llmq.artifact import Artifact
from llmq.data.images import Example
from llmq.errors import UserError
from llmq.files import at_home, cache, make_whole, safetensors_of, sha256_files, sha256_text
from llmq.models.matrices import Matrices
from llmq.types import Clock, Context, Loaded, Reading, Split

KINDS = frozenset({"classifier", "detector", "gan", "super-resolution"})


@dataclass(frozen=True)
class Learning:
    """How a family is trained unless a recipe says otherwise."""

    learning_rate: float
    batch_size: int
    loss_unit: str
    optim: Literal["adam", "adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    augment: Literal["none", "flip", "dihedral"] = "none"
    autocast: bool = False
    """Products in bfloat16: where that was measured to be faster and to learn as well."""
    channels_last: bool = False


@dataclass(frozen=True)
class Player:
    """One side of a training: the module that learns, and the loss of a batch that it lowers."""

    name: str
    module: Any
    loss: Callable[[Mapping[str, Any]], Any]


class Vision(BaseModel):
    """A family of image models. A family says its `network`, `prepare`, `example`, `players`, `batch` and `validate`.

    A module maps one float tensor to a tensor, or to a tuple of tensors, so that a graph of it can be exported; what
    follows (boxes out of scores, pixels out of numbers) is the family's own and stays in float.
    """

    learning: ClassVar[Learning]
    any_size: ClassVar[bool] = False
    """Whether the network takes images of any height and width, as an exported graph of it then must too."""
    unordered: ClassVar[bool] = False
    """Whether the rows of its outputs stand in no order, one row through all of them: what a detector's queries say."""
    watched_from: ClassVar[int] = 1
    """How many held-out examples the figure that is shown while training needs."""

    weights: str | None = Field(
        None, description="a .safetensors file, a folder with model.safetensors, or a built-in word; random if unset"
    )

    def check(self) -> None:
        """Raise `UserError` for weights that are not there or cannot be opened."""
        if self.weights is not None:
            from llmq.models.state import check_weights

            check_weights(self.weights)

    def network(self) -> Any:
        """The network of these settings with random weights, float32."""
        raise NotImplementedError

    def pretrained(self) -> Mapping[str, Any] | None:
        """The tensors of `weights` by the names that the network has for them; None if it is to begin at random."""
        if self.weights is None:
            return None
        from llmq.models.state import read_state

        return read_state(self.weights)

    def source(self) -> str:
        """What tells these weights from others, and a person where they come from."""
        if self.weights is None:
            return "random weights"
        path = at_home(self.weights)
        return f"{self.weights} {sha256_files(safetensors_of(path) if path.is_dir() else [path])[:16]}"

    def base(self, context: Context) -> Artifact:
        """The network at rest in the cache: its given weights, or random ones under the run's seed."""
        import torch

        where = self.source()
        about = [type(self).__module__, self.model_dump_json(), where, str(context.seed), torch.__version__]
        folder = cache("models", f"{type(self).__name__.lower()}-{sha256_text(*about)[:16]}")
        make_whole(folder, lambda partial_folder: self._fill(partial_folder, context.seed), shared=True)
        note = where if self.weights else f"{where}, seed {context.seed}"
        if getattr(self, "new_head", False):
            note += ", but for the last layer, which is new"
        return Artifact(model=self, weights=folder, notes={"source": note})  # type: ignore[arg-type]

    def _fill(self, folder: Path, seed: int) -> None:
        import torch

        from llmq.models.state import load_strictly, save_network

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network, given = self.network(), self.pretrained()
        if given is not None:
            load_strictly(network, given, str(self.weights))
        save_network(network, folder)

    def open(self, artifact: Artifact, device: str) -> Loaded:
        """The network in evaluation mode, or the exported graph; `processor` turns images into its input.

        A graph runs on the processor, whatever `device` the others of its run have.
        """
        from llmq.models.state import open_network

        if artifact.runtime == "openvino":
            from llmq.models.exported import ExportedModule, check_graph
            from llmq.models.runtime import DEVICE
            from llmq.quantize.apart import check_opens

            check_graph(artifact.weights)
            check_opens(artifact.weights, self)
            return Loaded(ExportedModule(artifact.weights), self.prepare, DEVICE, artifact)
        module: Any = open_network(self.network(), artifact.weights).eval().to(device)
        return Loaded(module, self.prepare, device, artifact)

    def skeleton(self, artifact: Artifact, device: str) -> Matrices:
        """What a step that changes weights works on."""
        return Matrices.of(artifact)

    def deployed(self, network: Any) -> Any:
        """What of a network is exported: one that computes the same, and may cost less."""
        return network

    def prepare(self, images: Sequence[Any]) -> Any:
        """Images uint8 `(height, width, channels)` as the float input `(n, channels, height, width)`."""
        raise NotImplementedError

    def example(self, batch_size: int) -> Any:
        """An input of the usual size, for exporting and timing; the same numbers each time."""
        raise NotImplementedError

    def probe(self, module: Any) -> Sequence[Any]:
        """What it makes of two usual inputs."""
        import torch

        module.eval().to(memory_format=torch.contiguous_format)  # files have no other, and sums depend on it
        with torch.inference_mode():
            answers = module(self.example(2).to(next(module.parameters()).device))
        return [t.cpu() for t in (answers if isinstance(answers, list | tuple) else (answers,))]

    def calibration(self, split: Split | None, samples: int, seed: int) -> Iterable[Any]:
        """Inputs such as the network will see, one image each: `samples` of the training images, drawn under a seed.

        Raises `UserError` where there is no data, or none that fits.
        """
        if split is None:
            raise UserError("it needs 'data' to calibrate on, such as the data that the network was trained on")
        self.check_images(split)
        import numpy as np

        rows = np.random.default_rng(seed).permutation(len(split.train))[:samples]
        return (self.prepare([split.train[int(row)].image]) for row in rows)

    def clocks(self, loaded: Loaded, speed: Any) -> Iterable[Clock]:
        """One batch through the module."""
        from llmq.environment import where_it_runs

        inputs = self.example(speed.batch_size).to(loaded.device)
        size = "x".join(map(str, inputs.shape))
        readings = (
            Reading("latency_p50", "ms", "lower", lambda s: 1000 * s),
            Reading("latency_p95", "ms", "lower", lambda s: 1000 * s, quantile=0.95),
            Reading("images_per_second", "images/s", "higher", lambda s: speed.batch_size / s),
        )
        protocol = f"input {size} float32, {where_it_runs(loaded)}"
        return [Clock(speed.name, partial(_run, loaded.module, inputs), readings, protocol, 3, speed.rounds)]

    def check_split(self, split: Split) -> None:
        """Raise `UserError` for data that this network cannot learn from, or be asked about."""

    def check_images(self, split: Split) -> None:
        """Raise `UserError` for images that this network cannot be given, whatever they are labelled with."""
        self.check_split(split)

    def numbered(self, split: Split) -> Split:
        """The split with its labels as this network numbers them."""
        return split

    def not_watchable(self, examples: Sequence[Example]) -> str:
        """Why the figure that is shown while training cannot be had of these held-out examples; empty if it can."""
        if len(examples) >= self.watched_from:
            return ""
        return f"{len(examples)} held-out example, and {self.watched_from} are needed"

    def players(self, network: Any) -> list[Player]:
        """Who learns what from a batch; most families have one player, a GAN two, which take turns."""
        raise NotImplementedError

    def batch(self, examples: Sequence[Example], rng: Any, augment: str, crop: int | None) -> dict[str, Any]:
        """The tensors of a batch to learn from, made of examples under a numpy generator `rng`."""
        raise NotImplementedError

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """Name and value of the figure that a person watches while this family learns."""
        raise NotImplementedError


def named(model: Any) -> str:
    """A family and which of its networks, for a message: `models.timm_classifier resnet18`."""
    kind = (getattr(model, "config", None) or {}).get("model_type")
    return " ".join(filter(None, (model.word, getattr(model, "architecture", None) or kind or model.weights)))


def _run(module: Any, inputs: Any) -> None:
    import torch

    with torch.inference_mode():
        module(inputs)


def in_batches(examples: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Examples, `size` at a time."""
    return ([examples[j] for j in range(i, min(i + size, len(examples)))] for i in range(0, len(examples), size))


def the_shape(split: Split, wanted: str, word: str) -> Split:
    """`split` if its examples are of the wanted shape. Raises `UserError` if not."""
    if split.shape != wanted:
        raise UserError(f"{word}: its examples are {split.shape}, and {wanted} is needed")
    return split
