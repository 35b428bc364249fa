"""torchvision's detectors."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.models.detector import Detections, Detector
from llmq.models.vision import Learning
from llmq.types import Model

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BACKBONES: Mapping[str, tuple[str, ...]] = {
    "fcos": ("small", *RESNETS),
    "retinanet": ("small", *RESNETS),
    "ssd": ("vgg16",),
    "ssdlite": ("mobilenet_v3_large",),
    "faster_rcnn": ("small", *RESNETS, "mobilenet_v3_large"),
}
SIZES = {"small": 128, "vgg16": 300}
HUB = {
    "COCO_V1": {
        ("fcos", "resnet50"): "fcos_resnet50_fpn",
        ("retinanet", "resnet50"): "retinanet_resnet50_fpn",
        ("ssd", "vgg16"): "ssd300_vgg16",
        ("ssdlite", "mobilenet_v3_large"): "ssdlite320_mobilenet_v3_large",
        ("faster_rcnn", "resnet50"): "fasterrcnn_resnet50_fpn",
        ("faster_rcnn", "mobilenet_v3_large"): "fasterrcnn_mobilenet_v3_large_fpn",
    }
}
"""Weights that torchvision brings from its site -> the pairs that have them, and what it calls each."""


class TorchvisionDetector(Detector, Model):
    """FCOS, RetinaNet, SSD, SSDLite or Faster R-CNN of torchvision.

    `small` is a backbone of 0.3 M parameters at stride 8 for small images. Images are scaled to a square of `size`,
    keeping their proportions but for SSD. Exported are backbone and heads; torchvision's own selection follows in
    float. Faster R-CNN, whose second stage depends on the first, is trained and run but not exported.
    """

    learning: ClassVar[Learning] = Learning(
        1e-3, 16, "detection loss", weight_decay=1e-2, autocast=True, channels_last=True
    )

    architecture: Literal["fcos", "retinanet", "ssd", "ssdlite", "faster_rcnn"] = "fcos"
    backbone: str | None = Field(None, description="small if unset, or the only one of SSD and SSDLite")
    classes: PositiveInt = Field(10, description="that it tells apart, background not counted")
    size: PositiveInt | None = Field(None, ge=32, description="of the square input; 128 with small, else 320, SSD 300")
    nms_threshold: float = Field(0.6, gt=0, le=1, description="of boxes of one class that overlap more, one is kept")
    coco: bool = Field(
        False, description="as torchvision's weights for COCO: 91 categories, fixed batch normalisation; with COCO_V1"
    )

    def check(self) -> None:
        """Raise `UserError` for a backbone that the architecture has not, a wrong size, or weights not there."""
        if self._backbone not in BACKBONES[self.architecture]:
            raise UserError(
                f"backbone {self.backbone!r} is none of {self.architecture}: {', '.join(BACKBONES[self.architecture])}"
            )
        fixed = {"ssd": 300, "ssdlite": 320}.get(self.architecture)
        if fixed and self.size not in (None, fixed):
            raise UserError(f"size {self.size}: {self.architecture} takes images of {fixed} only")
        if self.weights in HUB:
            if (self.architecture, self._backbone) not in HUB[self.weights]:
                raise UserError(f"weights {self.weights!r}: there are none for {self.architecture} on {self._backbone}")
        else:
            super().check()

    @property
    def _backbone(self) -> str:
        return self.backbone or BACKBONES[self.architecture][0]

    @property
    def _size(self) -> int:
        return self.size or SIZES.get(self._backbone, 320)

    @property
    def _is_coco(self) -> bool:
        return self.coco or self.weights in HUB

    @property
    def _background(self) -> int:
        """How many of the network's labels come before the first class."""
        return int(self.architecture in ("ssd", "ssdlite", "faster_rcnn"))

    def class_count(self) -> int:
        """How many labels it tells apart."""
        return 91 - self._background if self._is_coco else self.classes

    def class_names(self) -> tuple[str, ...]:
        """COCO's categories, where it has these."""
        if not self._is_coco:
            return ()
        from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

        return tuple(FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"][self._background :])

    def _whole(self) -> Any:
        from llmq.models.torchvision_networks import build

        options = {
            "score_thresh": self.score_threshold,
            "nms_thresh": self.nms_threshold,
            "detections_per_img": self.max_detections,
        }
        classes = self.class_count() + self._background
        return build(self.architecture, self._backbone, classes, self._size, self._is_coco, options)

    def source(self) -> str:
        """What tells these weights from others, and a person where they come from."""
        return f"torchvision {self.weights}" if self.weights in HUB else super().source()

    def network(self) -> Any:
        """Backbone and heads, or both stages of Faster R-CNN."""
        from llmq.models.torchvision_networks import Heads, TwoStages

        return (TwoStages if self.architecture == "faster_rcnn" else Heads)(self._whole())

    def pretrained(self) -> Mapping[str, Any] | None:
        """The tensors of `weights`; names that torchvision gave them in older versions are brought up to date."""
        if self.weights in HUB:
            from torchvision.models import get_model

            name = HUB[self.weights][self.architecture, self._backbone]
            return dict(get_model(name, weights=self.weights, weights_backbone=None).state_dict())
        state = super().pretrained()
        if state is None:
            return None
        from llmq.models.state import load_strictly

        network = self.network()
        load_strictly(network, state, str(self.weights))
        return dict(network.state_dict())

    def fit(self, images: Sequence[Any], targets: Sequence[dict[str, Any]] | None = None) -> Any:
        """torchvision's own transform, to a square."""
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + self._background} for target in targets]
        return _selection(self).fit(images, targets)

    def decode(self, raw: tuple[Any, ...], fitted: Sequence[Any], sizes: Sequence[Any]) -> list[Detections]:
        """torchvision's own selection."""
        return [
            Detections(found["boxes"].numpy(), found["scores"].numpy(), (found["labels"] - self._background).numpy())
            for found in _selection(self)(raw, fitted, sizes)
        ]

    def criterion(self, network: Any) -> Any:
        """torchvision's own losses."""
        return network.criterion()

    def example(self, batch_size: int) -> Any:
        """Noise of the input's size."""
        import torch

        return torch.randn(batch_size, 3, self._size, self._size, generator=torch.Generator().manual_seed(0))


@cache
def _selection(model: TorchvisionDetector) -> Any:
    import torch

    from llmq.models.torchvision_networks import Selection

    with torch.random.fork_rng(devices=[]):
        return Selection(model._whole(), model._size)
