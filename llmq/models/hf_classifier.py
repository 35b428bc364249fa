"""An image classifier of transformers: a hub id, a local folder, or random under a `config`.

The image processor makes the input. The settings of every stage hold the configuration and the image processor: a
stage needs neither the hub nor the folder of the weights.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from llmq.errors import UserError
from llmq.types import JsonObject
from llmq.vision.classifier import Classifier, with_channels, with_new_head
from llmq.vision.family import noise
from llmq.vision.hugging_face import HuggingFaceModel, image_processor

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor


class HfClassifier(HuggingFaceModel, Classifier):
    auto: ClassVar[str] = "AutoModelForImageClassification"
    purpose: ClassVar[str] = "image classifier"
    answers: ClassVar[tuple[str, ...]] = ("logits",)
    usual: ClassVar[str] = "resnet"

    preprocessor: JsonObject | None = Field(
        None, description="of transformers; the weights' own, or scaling to the configuration's image_size"
    )

    @property
    def outputs(self) -> int:
        return self.class_count()

    def names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(reversed(label.split(", "))) for label in self.told_labels())

    def with_new_head(self, state: "dict[str, Tensor]") -> "dict[str, Tensor]":
        return with_new_head(state, self.network(), self.outputs)

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        import numpy as np
        import torch
        from transformers import ViTImageProcessor

        config = self.configuration()
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
        side = int(max(size)) if isinstance(size, list | tuple) else int(size)
        if (own := self.preprocessor) is None:
            half = [0.5] * channels
            process = ViTImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half)
        else:
            process = image_processor(json.dumps(own))
        counts = [np.size(each) for each in (process.image_mean, process.image_std)]
        if process.do_normalize and not {*counts} <= {1, channels}:  # one is that of all channels
            raise UserError(
                f"{self.title}: the image processor has {counts[0]} means and {counts[1]} deviations, and the network "
                f"{channels} channels; set image_mean and image_std of preprocessor"
            )
        told = {"input_data_format": "channels_last", "return_tensors": "pt"}
        parts = [process(with_channels(image, channels), **told)["pixel_values"] for image in images]
        return torch.cat(parts).float()  # (n, channels, height, width)

    def example(self, batch_size: int) -> "Tensor":
        import numpy as np

        one = self.prepare([np.zeros((64, 64, 3), np.uint8)])  # the image processor decides the size
        return noise(batch_size, *one.shape[1:])
