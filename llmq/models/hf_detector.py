"""A detector of transformers (RT-DETR, D-FINE, DETR, YOLOS and their like): a hub id, a folder, or a `config`.

Images are stretched to a square, as for RT-DETR and D-FINE; DETR and YOLOS were trained on images that kept their
proportions, which no graph of one fixed size can take. The graph gives logits and boxes; the post-processing of the
image processor follows in float. The settings of every stage hold the configuration and the image processor.
"""

import json
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.vision.detector import Detections, Detector
from llmq.vision.family import Training
from llmq.vision.hugging_face import HuggingFaceModel, image_processor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import BaseImageProcessor

    from llmq.vision.detector import Criterion, Fitted, Images, Sizes, Targets

TWO_STAGES = ("rt_detr", "rt_detr_v2")
"""The families whose int8 was seen to need it; D-FINE was as bad with it."""
QUERIES = tuple(f"model.model.{part}" for part in ("decoder", "enc_output", "enc_score_head", "enc_bbox_head"))


class HfDetector(HuggingFaceModel, Detector):
    auto: ClassVar[str] = "AutoModelForObjectDetection"
    purpose: ClassVar[str] = "object detector"
    answers: ClassVar[tuple[str, ...]] = ("logits", "pred_boxes")  # (n, queries, classes) and (n, queries, 4)
    usual: ClassVar[str] = "rt_detr"
    training: ClassVar[Training] = Training(8, 1e-4, "detection loss", weight_decay=1e-4, augment="flip")

    new_head: bool = Field(False, description="begin with new last layers, for other classes than the weights have")
    size: PositiveInt | None = Field(None, ge=32, description="of the square input; the image processor's, else 640")

    def resolved(self) -> Self:
        made = super().resolved()
        return made.model_copy(update={"size": made.side})

    @property
    def side(self) -> int:
        written = (self.preprocessor or {}).get("size") or {}
        return self.size or (int(written["height"]) if "height" in written else 640)

    @property
    def unordered(self) -> bool:
        """RT-DETR and D-FINE sort queries by score: rounding swaps two with nearly equal scores."""
        return True

    @property
    def floats(self) -> tuple[str, ...]:
        """The choice of queries and the decoder: rounding there swaps the queries, and with them whole detections."""
        return QUERIES if (self.config or {}).get("model_type") in TWO_STAGES else ()

    def class_names(self) -> tuple[str, ...]:
        return tuple(self.told_labels())

    def with_new_head(self, state: "dict[str, Tensor]") -> "dict[str, Tensor]":
        own = self.network().state_dict()
        fresh = {name for name, new in own.items() if name not in state or state[name].shape != new.shape}
        if not fresh:
            raise UserError("new_head: the weights have as many classes already; leave it out")
        if strange := [n for n in fresh if n not in state or state[n].shape[1:] != own[n].shape[1:]]:
            raise UserError(
                f"new_head: {min(strange)!r} of {self.weights!r} is of another architecture than config says"
            )
        return {name: new if name in fresh else state[name] for name, new in own.items()}

    def fit(self, images: "Images", targets: "Targets | None" = None) -> "Fitted":
        """The input that the image processor makes of images, each stretched to the square."""
        import torch

        size = self.side
        made = self._processor()(
            images=[image.copy() for image in images],
            size={"height": size, "width": size},
            do_pad=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        if targets is not None:
            scales = [torch.tensor([size / image.shape[1], size / image.shape[0]] * 2) for image in images]  # (4,)
            targets = [{**t, "boxes": t["boxes"] * scale.float()} for t, scale in zip(targets, scales, strict=True)]
        return made["pixel_values"].float(), [(size, size)] * len(images), targets

    def decode(self, raw: "tuple[Tensor, ...]", fitted: "Sizes", sizes: "Sizes") -> list[Detections]:
        """The post-processing of the image processor, best first."""
        from types import SimpleNamespace

        outputs = SimpleNamespace(logits=raw[0], pred_boxes=raw[1])  # (n, queries, classes), (n, queries, 4)
        made = self._processor().post_process_object_detection(
            outputs, self.score_threshold, [(int(h), int(w)) for h, w in sizes]
        )
        orders = [one["scores"].argsort(descending=True, stable=True)[: self.max_detections] for one in made]
        return [
            Detections(*(one[name][order].numpy() for name in ("boxes", "scores", "labels")))
            for one, order in zip(made, orders, strict=True)
        ]

    def _processor(self) -> "BaseImageProcessor":
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

        model_type = str((self.config or {}).get("model_type"))
        # D-FINE has no image processor of its own and takes that of RT-DETR.
        usual = {} if model_type in IMAGE_PROCESSOR_MAPPING_NAMES else {"image_processor_type": "RTDetrImageProcessor"}
        return image_processor(json.dumps(self.preprocessor or usual), model_type)

    def criterion(self, network: "Module") -> "Criterion":
        """The loss of transformers: matching, classes and boxes, in all layers of the decoder."""
        import torch

        model: Any = network.model

        def centred(boxes: "Tensor") -> "Tensor":
            # corners (n, 4) as centre, width and height, in shares of the square
            return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1) / self.side

        def loss(images: "Tensor", targets: "Targets") -> "Tensor":
            labels = [{"class_labels": target["labels"], "boxes": centred(target["boxes"])} for target in targets]
            answer: Tensor = model(pixel_values=images, labels=labels).loss
            return answer

        return loss
