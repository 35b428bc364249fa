"""Object detectors that transformers opens."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import at_home, safetensors_of, sha256_files
from llmq.models import hub
from llmq.models.detector import Detections, Detector
from llmq.models.vision import Learning
from llmq.types import Context, Model

PREPROCESSOR = "preprocessor_config.json"


class HfDetector(Detector, Model):
    """A detector of transformers (RT-DETR, D-FINE, DETR, YOLOS and their like): a hub id, a folder, or a `config`.

    Images are stretched to a square, as RT-DETR and D-FINE do; DETR and YOLOS were trained on images that kept their
    proportions, which no graph of one fixed size can hold. The graph gives logits and boxes; the image processor's own
    post-processing follows in float. Configuration and processor are kept with the settings of every stage.
    """

    learning: ClassVar[Learning] = Learning(1e-4, 8, "detection loss", weight_decay=1e-4, augment="flip")
    # RT-DETR and D-FINE sort their queries by score: rounding swaps two that are nearly alike.
    unordered: ClassVar[bool] = True

    weights: str | None = Field(None, description="a folder, or owner/name (or owner/name@revision) on the hub")
    classes: PositiveInt | None = Field(None, description="as the weights have if unset")
    new_head: bool = Field(False, description="begin with new last layers, for other classes than the weights have")
    size: PositiveInt | None = Field(None, ge=32, description="of the square input; the image processor's, else 640")
    config: dict[str, Any] | None = Field(None, description="of transformers, with its model_type; the weights' own")
    preprocessor: dict[str, Any] | None = Field(None, description="of transformers; the weights' own")

    def check(self) -> None:
        """Raise `UserError` for weights that are not there, or are no detector."""
        if self.weights is None:
            if not (self.config or {}).get("model_type"):
                raise UserError("'weights' is needed, or a 'config' with a model_type, such as rt_detr")
        elif not (path := at_home(self.weights)).exists():
            hub.check_id(self.weights)
        elif path.is_file():
            raise UserError(f"{self.weights!r} is a file; name a folder with config.json and *.safetensors")
        else:
            super().check()
            hub.configuration(path)

    def base(self, context: Context) -> Artifact:
        """The network at rest with every setting decided."""
        return super(HfDetector, self.resolved()).base(context)

    def resolved(self) -> Self:
        """These settings with configuration, processor, classes and size of the weights filled in."""
        folder = self._folder()
        config, preprocessor = self.config, self.preprocessor
        if folder:
            config = config or hub.configuration(folder)
            if not preprocessor and (folder / PREPROCESSOR).is_file():
                preprocessor = hub.configuration(folder, PREPROCESSOR)
        made = self.model_copy(update={"config": config, "preprocessor": preprocessor})
        return made.model_copy(update={"classes": made.class_count(), "size": made._size})

    def _folder(self) -> Path | None:
        if self.weights is None:
            return None
        path = at_home(self.weights)
        return path if path.is_dir() else hub.snapshot(self.weights)

    def _configuration(self) -> Any:
        from transformers import AutoConfig

        try:
            config = AutoConfig.for_model(**(self.config or {}))
        except (ValueError, TypeError) as error:
            raise UserError(f"transformers knows no such configuration: {str(error).partition('. ')[0]}") from None
        if self.classes and self.classes != config.num_labels:
            config.num_labels = self.classes
        return hub.with_architectures(config)

    @property
    def _size(self) -> int:
        written = (self.preprocessor or {}).get("size") or {}
        return self.size or (int(written["height"]) if "height" in written else 640)

    def class_count(self) -> int:
        """How many labels it tells apart."""
        return self.classes or int(self._configuration().num_labels)

    def class_names(self) -> tuple[str, ...]:
        """What the configuration calls its labels; empty where it only numbers them."""
        labels = self._configuration().id2label
        names = tuple(str(labels[i]) for i in sorted(labels))
        return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names

    def network(self) -> Any:
        """The network of this configuration; it answers with logits and boxes."""
        from transformers import AutoModelForObjectDetection

        from llmq.models.hf_raw import RawDetector

        config = self._configuration()
        try:
            return RawDetector(AutoModelForObjectDetection.from_config(config))
        except ValueError:
            raise UserError(f"transformers has no object detector of model_type {config.model_type!r}") from None

    def pretrained(self) -> Mapping[str, Any] | None:
        """The tensors of the weights; with `new_head` those that do not fit these classes are new."""
        folder = self._folder()
        if folder is None:
            return None
        from transformers import AutoModelForObjectDetection

        from llmq.models.hf_raw import RawDetector

        model = hub.opened(AutoModelForObjectDetection, folder, str(self.weights))
        state: dict[str, Any] = RawDetector(model).state_dict()
        if not self.new_head:
            return state
        own = self.network().state_dict()
        fresh = {name for name, new in own.items() if name not in state or state[name].shape != new.shape}
        if not fresh:
            raise UserError("new_head: the weights have as many classes already; leave it out")
        if strange := [n for n in fresh if n not in state or state[n].shape[1:] != own[n].shape[1:]]:
            raise UserError(
                f"new_head: {min(strange)!r} of {self.weights!r} is of another architecture than config says"
            )
        return {name: new if name in fresh else state[name] for name, new in own.items()}

    def source(self) -> str:
        """What tells these weights from others, and a person where they come from."""
        folder = self._folder()
        if folder is None:
            return "random weights"
        return f"{self.weights} {sha256_files(safetensors_of(folder))[:16]}"

    def fit(self, images: Sequence[Any], targets: Sequence[dict[str, Any]] | None = None) -> Any:
        """What the image processor makes of images, each stretched to the square."""
        import torch

        process, size = self._processor(), self._size
        made = process(
            images=[image.copy() for image in images],
            size={"height": size, "width": size},
            do_pad=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        if targets is not None:
            scales = [torch.tensor([size / image.shape[1], size / image.shape[0]] * 2) for image in images]
            targets = [{**t, "boxes": t["boxes"] * scale.float()} for t, scale in zip(targets, scales, strict=True)]
        return made["pixel_values"].float(), [(size, size)] * len(images), targets

    def decode(self, raw: tuple[Any, ...], fitted: Sequence[Any], sizes: Sequence[Any]) -> list[Detections]:
        """The image processor's own post-processing, best first."""
        from types import SimpleNamespace

        outputs = SimpleNamespace(logits=raw[0], pred_boxes=raw[1])
        found = self._processor().post_process_object_detection(
            outputs, self.score_threshold, [(int(h), int(w)) for h, w in sizes]
        )
        orders = [one["scores"].argsort(descending=True, stable=True)[: self.max_detections] for one in found]
        return [
            Detections(*(one[name][order].numpy() for name in ("boxes", "scores", "labels")))
            for one, order in zip(found, orders, strict=True)
        ]

    def _processor(self) -> Any:
        return _processor(json.dumps(self.preprocessor), str((self.config or {}).get("model_type")))

    def criterion(self, network: Any) -> Any:
        """The loss of transformers: matching, classes and boxes, all layers of the decoder."""
        return network.criterion(self._size)

    def example(self, batch_size: int) -> Any:
        """Noise of the input's size."""
        import torch

        return torch.randn(batch_size, 3, self._size, self._size, generator=torch.Generator().manual_seed(0))


@cache
def _processor(written: str, model_type: str) -> Any:
    """The image processor of a written configuration, or the family's with its defaults, or RT-DETR's as for D-FINE."""
    from tempfile import TemporaryDirectory

    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    settings = json.loads(written) or {}
    if not settings and model_type not in IMAGE_PROCESSOR_MAPPING_NAMES:
        settings = {"image_processor_type": "RTDetrImageProcessor"}
    with TemporaryDirectory() as folder:
        (Path(folder) / PREPROCESSOR).write_text(json.dumps(settings), encoding="utf-8")
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
