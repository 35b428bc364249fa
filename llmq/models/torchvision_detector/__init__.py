"""FCOS, RetinaNet, SSD, SSDLite or Faster R-CNN of torchvision.

`small` is a backbone of 0.3 M parameters at stride 8 for small images. Images are scaled to a square of `size`; all
but SSD keep their proportions. A graph holds backbone and heads; torchvision's own selection follows in float. Faster
R-CNN, whose second stage depends on the first, can be trained, run, and exported to ONNX, one image at a time.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.vision.detector import Detections, Detector
from llmq.vision.family import Training

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.models.torchvision_detector.networks import Selection
    from llmq.vision.detector import Criterion, Fitted, Images, Sizes, Targets

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BACKBONES: Mapping[str, tuple[str, ...]] = {
    "fcos": ("small", *RESNETS),
    "retinanet": ("small", *RESNETS),
    "ssd": ("vgg16",),
    "ssdlite": ("mobilenet_v3_large",),
    "faster_rcnn": ("small", *RESNETS, "mobilenet_v3_large"),
}
SIZES = {"small": 128, "vgg16": 300}  # pixels of a side; other backbones have 320
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
"""The weights that torchvision downloads: pairs of architecture and backbone, and torchvision's names of them."""


class TorchvisionDetector(Detector):
    training: ClassVar[Training] = Training(
        16, 1e-3, "detection loss", weight_decay=1e-2, autocast=True, channels_last=True
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
    def side(self) -> int:
        return self.size or SIZES.get(self._backbone, 320)

    @property
    def _is_coco(self) -> bool:
        return self.coco or self.weights in HUB

    @property
    def two_stages(self) -> bool:
        return self.architecture == "faster_rcnn"

    @property
    def unordered(self) -> bool:
        """Faster R-CNN sorts what it finds by score; the others answer for each anchor, in order."""
        return self.two_stages

    @property
    def _background(self) -> int:
        """The number of labels before the first class: 1 where the network has a label for the background."""
        return int(self.architecture in ("ssd", "ssdlite", "faster_rcnn"))

    def class_count(self) -> int:
        return 91 - self._background if self._is_coco else self.classes  # 91 with the background

    def class_names(self) -> tuple[str, ...]:
        if not self._is_coco:
            return ()
        from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

        return tuple(FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"][self._background :])

    def _whole(self) -> "Module":
        from llmq.models.torchvision_detector.networks import build

        options = {
            "score_thresh": self.score_threshold,
            "nms_thresh": self.nms_threshold,
            "detections_per_img": self.max_detections,
        }
        classes = self.class_count() + self._background
        whole: Module = build(self.architecture, self._backbone, classes, self.side, self._is_coco, options)
        return whole

    def source(self) -> str:
        return f"torchvision {self.weights}" if self.weights in HUB else super().source()

    def network(self) -> "Module":
        """The backbone and heads, or both stages of Faster R-CNN."""
        from llmq.models.torchvision_detector.networks import Heads, TwoStages

        return TwoStages(self._whole(), self.side) if self.two_stages else Heads(self._whole())

    def pretrained(self) -> "Mapping[str, Tensor] | None":
        """The tensors of `weights`, under torchvision's present names."""
        if self.weights in HUB:
            from torchvision.models import get_model

            name = HUB[self.weights][self.architecture, self._backbone]
            return dict(get_model(name, weights=self.weights, weights_backbone=None).state_dict())
        state = super().pretrained()
        if state is None:
            return None
        from llmq.vision.state import load_strictly

        network = self.network()
        load_strictly(network, state, str(self.weights))  # renames tensors of older versions
        return dict(network.state_dict())

    def fit(self, images: "Images", targets: "Targets | None" = None) -> "Fitted":
        """torchvision's own transform to a square; targets get the network's labels."""
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + self._background} for target in targets]
        return _selection(self).fit(images, targets)

    def decode(self, raw: "tuple[Tensor, ...]", fitted: "Sizes", sizes: "Sizes") -> list[Detections]:
        """torchvision's own selection; detections get the labels of the data."""
        return [
            Detections(one["boxes"].numpy(), one["scores"].numpy(), (one["labels"] - self._background).numpy())
            for one in _selection(self)(raw, fitted, sizes)
        ]

    def criterion(self, network: "Module") -> "Criterion":
        """torchvision's own losses."""
        from llmq.models.torchvision_detector.networks import Heads, TwoStages

        assert isinstance(network, Heads | TwoStages)
        return network.criterion()


@cache
def _selection(model: TorchvisionDetector) -> "Selection":
    import torch

    from llmq.models.torchvision_detector.networks import Selection

    with torch.random.fork_rng(devices=[]):  # random weights are made, and not used
        return Selection(model._whole(), model.side)
