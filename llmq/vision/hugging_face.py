"""The base of the image models of transformers: a hub id, a local folder, or random weights under a `config`."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.files import at_home, sha256_files
from llmq.guarded.weights import safetensors_of
from llmq.types import JsonObject
from llmq.vision import hub
from llmq.vision.family import ImageModel
from llmq.vision.state import check_kinds, read_state, refused

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

PREPROCESSOR = "preprocessor_config.json"


class HuggingFaceModel(ImageModel):
    """An image model of transformers.

    The settings hold the configuration and the image processor: a stage needs neither the hub nor the folder.
    """

    auto: ClassVar[str]
    """The class of transformers that opens the network, such as `AutoModelForImageClassification`."""
    purpose: ClassVar[str]  # for errors, such as "image classifier"
    answers: ClassVar[tuple[str, ...]]
    """The names of the outputs."""
    usual: ClassVar[str]
    """A common model_type, which an error names."""

    weights: str | None = Field(None, description="a folder, or owner/name (or owner/name@revision) on the hub")
    classes: PositiveInt | None = Field(None, description="as the weights have if unset")
    new_head: bool = Field(False, description="begin with a new last layer, for other classes than the weights have")
    config: JsonObject | None = Field(None, description="of transformers, with its model_type; the weights' own")
    preprocessor: JsonObject | None = Field(None, description="of transformers; the weights' own")

    def check(self) -> None:
        if self.weights is None:
            if not (self.config or {}).get("model_type"):
                raise UserError(f"'weights' is needed, or a 'config' with a model_type, such as {self.usual}")
        elif not (path := at_home(self.weights)).exists():
            hub.check_id(self.weights)
        elif path.is_file():
            raise UserError(f"{self.weights!r} is a file; name a folder with config.json and *.safetensors")
        else:
            super().check()
            hub.configuration(path)

    def _folder(self) -> Path | None:
        if self.weights is None:
            return None
        path = at_home(self.weights)
        return path if path.is_dir() else hub.snapshot(self.weights)  # a folder comes before the hub

    def resolved(self) -> Self:
        folder = self._folder()
        config, preprocessor = self.config, self.preprocessor
        if folder:
            config = config or hub.configuration(folder)
            if not preprocessor and (folder / PREPROCESSOR).is_file():
                preprocessor = hub.configuration(folder, PREPROCESSOR)
        made = self.model_copy(update={"config": config, "preprocessor": preprocessor})
        return made.model_copy(update={"classes": made.class_count()})  # unset, the configuration tells them

    def source(self) -> str:
        folder = self._folder()
        return f"{self.weights} {sha256_files(safetensors_of(folder))[:16]}" if folder else "random weights"

    def configuration(self) -> "PretrainedConfig":
        """The configuration of transformers, with as many labels as `classes`."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.for_model(**(self.config or {}))
        except (ValueError, TypeError) as error:
            raise UserError(f"transformers knows no such configuration: {str(error).partition('. ')[0]}") from None
        if self.classes and self.classes != config.num_labels:
            config.num_labels = self.classes  # the setter makes new labels
        return _with_architectures(config)

    def class_count(self) -> int:
        """The number of labels that the network tells apart."""
        return self.classes or int(self.configuration().num_labels)

    def labels(self) -> list[str]:
        """The label of each output, from the configuration."""
        labels = self.configuration().id2label
        return [str(labels[i]) for i in sorted(labels)]

    def told_labels(self) -> list[str]:
        """The labels; none where transformers has numbered the outputs itself."""
        labels = self.labels()
        return [] if all(name == f"LABEL_{i}" for i, name in enumerate(labels)) else labels

    def network(self) -> "Module":
        import transformers

        from llmq.vision.outputs import Outputs

        config = self.configuration()
        try:
            return Outputs(getattr(transformers, self.auto).from_config(config), self.answers)  # random weights
        except ValueError:
            raise UserError(f"transformers has no {self.purpose} of model_type {config.model_type!r}") from None

    def pretrained(self) -> "Mapping[str, Tensor] | None":
        folder = self._folder()
        if folder is None:
            return None
        from llmq.vision.outputs import Outputs

        state = Outputs(_opened(self.auto, folder, str(self.weights)), self.answers).state_dict()
        return self.with_new_head(state) if self.new_head else state

    def with_new_head(self, state: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """The tensors of `state` with new last layers. Raises `UserError` if the old last layers fit."""
        raise NotImplementedError


@cache
def image_processor(written: str, model_type: str = "") -> "BaseImageProcessor":
    """The image processor of a configuration in JSON; `model_type` tells the class where the configuration does not."""
    from tempfile import TemporaryDirectory

    from transformers import AutoImageProcessor

    with TemporaryDirectory() as folder:  # from_pretrained reads files
        (Path(folder) / PREPROCESSOR).write_text(written, encoding="utf-8")
        if model_type:
            (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)  # no code from the hub


def _with_architectures(config: "PretrainedConfig") -> "PretrainedConfig":
    """A configuration with a list of architectures, which transformers reads where a family has two classes (DeiT)."""
    config.architectures = config.architectures or []
    return config


def _opened(auto: str, folder: Path, weights: str) -> "PreTrainedModel":
    """Open a folder by transformers, in float32; transformers renames the tensors of older files.

    Raises `UserError` that names the tensors that the folder lacks, those without a place, and those of another shape
    or kind: transformers would make the first random, leave out the second, and say so in a log alone.
    """
    files = read_state(str(folder))  # raises for a broken file
    import transformers

    try:
        config = _with_architectures(transformers.AutoConfig.from_pretrained(folder))
        model, said = getattr(transformers, auto).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            dtype="float32",
            ignore_mismatched_sizes=True,  # they are told, and refused below
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{weights!r} is not opened by transformers: {' '.join(str(error).split())[:300]}") from None
    own = model.state_dict() | dict(model.named_buffers())  # with buffers that are not saved

    def counts_batches(name: str) -> bool:
        layer, _, leaf = name.rpartition(".")
        return leaf == "num_batches_tracked" and f"{layer}.running_mean" in own

    # A fixed normalization counts no batches, even if the file has a count; a missing count is never read.
    left = [n for n in said["unexpected_keys"] if n not in own and not counts_batches(n)]
    missing = [n for n in said["missing_keys"] if not counts_batches(n)]
    if missing or left or said["mismatched_keys"]:
        shapes = sorted((name, tuple(there), tuple(here)) for name, there, here in said["mismatched_keys"])
        raise refused(weights, sorted(missing), sorted(left), shapes)
    if errors := said.get("error_msgs"):
        raise UserError(f"{weights!r} is not opened by transformers: {' '.join(str(errors[0]).split())}")
    check_kinds(own, files, weights)
    return model
