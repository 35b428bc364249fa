"""Image classifiers that transformers opens."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import at_home, safetensors_of, sha256_files
from llmq.models import hub
from llmq.models.classifier import Classifier, with_channels, with_new_head
from llmq.types import Context, Model

PREPROCESSOR = "preprocessor_config.json"


class HfClassifier(Classifier, Model):
    """An image classifier of transformers: a hub id, a local folder, or random under a `config`.

    Its image processor makes the input. Configuration and processor are kept with the settings of every stage, so that
    a stage needs neither the hub nor the folder it came from.
    """

    weights: str | None = Field(None, description="a folder, or owner/name (or owner/name@revision) on the hub")
    classes: PositiveInt | None = Field(None, description="as the weights have if unset")
    new_head: bool = Field(False, description="begin with a new last layer, for other classes than the weights have")
    config: dict[str, Any] | None = Field(None, description="of transformers, with its model_type; the weights' own")
    preprocessor: dict[str, Any] | None = Field(
        None, description="of transformers; the weights' own, or scaling to the configuration's image_size"
    )

    def check(self) -> None:
        """Raise `UserError` for weights that are not there, or are no image classifier."""
        if self.weights is None:
            if not (self.config or {}).get("model_type"):
                raise UserError("'weights' is needed, or a 'config' with a model_type, such as resnet")
        elif not (path := at_home(self.weights)).exists():
            hub.check_id(self.weights)
        elif path.is_file():
            raise UserError(f"{self.weights!r} is a file; name a folder with config.json and *.safetensors")
        else:
            super().check()
            hub.configuration(path)

    def base(self, context: Context) -> Artifact:
        """The network at rest with every setting decided."""
        return super(HfClassifier, self.resolved()).base(context)

    def resolved(self) -> Self:
        """These settings with the configuration and the processor of the weights filled in."""
        folder = self._folder()
        config, preprocessor = self.config, self.preprocessor
        if folder:
            config = config or hub.configuration(folder)
            if not preprocessor and (folder / PREPROCESSOR).is_file():
                preprocessor = hub.configuration(folder, PREPROCESSOR)
        made = self.model_copy(update={"config": config, "preprocessor": preprocessor})
        return made.model_copy(update={"classes": made._configuration().num_labels})

    def _folder(self) -> Path | None:
        if self.weights is None:
            return None
        path = at_home(self.weights)
        return path if path.is_dir() else hub.snapshot(self.weights)

    def _configuration(self) -> Any:
        from transformers import AutoConfig

        written = dict(self.config or {})
        try:
            config = AutoConfig.for_model(**written)
        except (ValueError, TypeError) as error:
            raise UserError(f"transformers knows no such configuration: {str(error).partition('. ')[0]}") from None
        if self.classes and self.classes != config.num_labels:
            config.num_labels = self.classes
        return hub.with_architectures(config)

    @property
    def outputs(self) -> int:
        """How many logits the network has."""
        return self.classes or int(self._configuration().num_labels)

    def network(self) -> Any:
        """The network of this configuration; it answers with its logits alone."""
        from transformers import AutoModelForImageClassification

        from llmq.models.hf_logits import Logits

        config = self._configuration()
        try:
            return Logits(AutoModelForImageClassification.from_config(config))
        except ValueError:
            raise UserError(f"transformers has no image classifier of model_type {config.model_type!r}") from None

    def pretrained(self) -> Mapping[str, Any] | None:
        """The tensors of the weights; with `new_head` those of the last layer are zeros."""
        folder = self._folder()
        if folder is None:
            return None
        from transformers import AutoModelForImageClassification

        from llmq.models.hf_logits import Logits

        model = hub.opened(AutoModelForImageClassification, folder, str(self.weights))
        state: dict[str, Any] = Logits(model).state_dict()
        return with_new_head(state, self.network(), self.outputs) if self.new_head else state

    def source(self) -> str:
        """What tells these weights from others, and a person where they come from."""
        folder = self._folder()
        if folder is None:
            return "random weights"
        return f"{self.weights} {sha256_files(safetensors_of(folder))[:16]}"

    def names(self) -> tuple[tuple[str, ...], ...]:
        """For each output what it may be called, as the configuration says."""
        labels = self._configuration().id2label
        return tuple(tuple(reversed(str(labels[i]).split(", "))) for i in sorted(labels))

    def prepare(self, images: Sequence[Any]) -> Any:
        """What the image processor makes of images."""
        import torch

        channels = getattr(self._configuration(), "num_channels", 3)
        process = _processor(json.dumps(self.preprocessor), self._size())
        parts = [
            process(with_channels(image, channels), input_data_format="channels_last", return_tensors="pt")[
                "pixel_values"
            ]
            for image in images
        ]
        return torch.cat(parts).float()

    def _size(self) -> int:
        size = getattr(self._configuration(), "image_size", 224)
        return int(max(size)) if isinstance(size, list | tuple) else int(size)

    def example(self, batch_size: int) -> Any:
        """Normal noise of the size that the image processor makes."""
        import numpy as np
        import torch

        one = self.prepare([np.zeros((64, 64, 3), np.uint8)])
        return torch.randn(batch_size, *one.shape[1:], generator=torch.Generator().manual_seed(0))


@cache
def _processor(written: str, size: int) -> Any:
    """The image processor of a written configuration, or one that scales to a square."""
    from tempfile import TemporaryDirectory

    from transformers import AutoImageProcessor, ViTImageProcessor

    settings = json.loads(written)
    if settings is None:
        return ViTImageProcessor(size={"height": size, "width": size})
    with TemporaryDirectory() as folder:
        (Path(folder) / PREPROCESSOR).write_text(written, encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
