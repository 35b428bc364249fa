"""torchvision's detectors, taken apart: the heads that a graph is exported of, and what is done with their output.

A detector of torchvision is backbone, heads, anchors, losses and selection in one. `Heads` holds what has weights,
under torchvision's own names; `Selection` is the rest, which makes detections of what the heads say.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import detection, mobilenet, resnet
from torchvision.models.detection import backbone_utils, faster_rcnn, fcos, retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from llmq.errors import UserError

Options = Mapping[str, Any]
SMALL_ANCHORS = (10.0, 16.0, 26.0, 42.0)  # pixels; a detector on the small backbone has one level


class SmallBackbone(nn.Sequential):  # type: ignore[misc]
    """Two strided convolutions and two residual blocks: 0.3 M parameters, one feature map at stride 8."""

    def __init__(self, channels: int = 96, out_channels: int = 64) -> None:
        half = channels // 2
        shortcut = nn.Sequential(nn.Conv2d(half, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))
        super().__init__(
            *_conv(3, channels // 4),
            *_conv(channels // 4, half),
            resnet.BasicBlock(half, channels, 2, shortcut),
            resnet.BasicBlock(channels, channels),
            nn.Conv2d(channels, out_channels, 1),
        )
        self.out_channels = out_channels


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def build(architecture: str, backbone: str, classes: int, size: int, coco: bool, options: Options) -> Any:
    """A detector of torchvision with random weights that takes images in a square of `size`.

    With `coco` its batch normalisation is fixed, as in torchvision's weights for COCO.
    """
    square = {"min_size": size, "max_size": size, "size_divisible": size}
    if architecture in ("ssd", "ssdlite"):
        name = {"ssd": "ssd300_vgg16", "ssdlite": "ssdlite320_mobilenet_v3_large"}[architecture]
        return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=classes, **options)
    # The first weights for COCO of these two were trained without the small number in the root.
    eps = 0.0 if architecture in ("retinanet", "faster_rcnn") and backbone == "resnet50" else 1e-5
    norm = partial(FrozenBatchNorm2d, eps=eps) if coco else nn.BatchNorm2d
    builder = {"fcos": _fcos, "retinanet": _retinanet, "faster_rcnn": _faster_rcnn}[architecture]
    return builder(backbone, classes, norm, {**square, **options})


def _pyramid(name: str, norm: Callable[..., nn.Module], **levels: Any) -> nn.Module:
    layers = 6 if name.startswith("mobilenet") else 5
    if name.startswith("mobilenet"):
        body = mobilenet.__dict__[name](weights=None, norm_layer=norm)
        return backbone_utils._mobilenet_extractor(body, True, layers)
    body = resnet.__dict__[name](weights=None, norm_layer=norm)
    return backbone_utils._resnet_fpn_extractor(body, layers, **levels)


def _fcos(backbone: str, classes: int, norm: Any, options: Options) -> nn.Module:
    if backbone != "small":
        body = _pyramid(backbone, norm, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        return fcos.FCOS(body, classes, **options)
    body = SmallBackbone()
    head = fcos.FCOSHead(body.out_channels, 1, classes, num_convs=1)
    # Batch normalisation can be folded into the convolution before it; torchvision's group normalisation cannot.
    head.classification_head = fcos.FCOSClassificationHead(body.out_channels, 1, classes, 1, norm_layer=nn.BatchNorm2d)
    head.regression_head = fcos.FCOSRegressionHead(body.out_channels, 1, 1, norm_layer=nn.BatchNorm2d)
    return fcos.FCOS(body, classes, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)), head=head, **options)


def _retinanet(backbone: str, classes: int, norm: Any, options: Options) -> nn.Module:
    if backbone != "small":
        body = _pyramid(backbone, norm, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        return retinanet.RetinaNet(body, classes, **options)
    anchors = AnchorGenerator((SMALL_ANCHORS,), ((0.7, 1.0, 1.6),))
    body = SmallBackbone()
    head = retinanet.RetinaNetHead(body.out_channels, 12, classes, norm_layer=nn.BatchNorm2d)
    return retinanet.RetinaNet(body, classes, anchor_generator=anchors, head=head, **options)


def _faster_rcnn(backbone: str, classes: int, norm: Any, options: Options) -> nn.Module:
    options = {f"box_{name}" if name in BOX_OPTIONS else name: value for name, value in options.items()}
    if backbone == "mobilenet_v3_large":
        sizes = ((32, 64, 128, 256, 512),) * 3
        options = {"rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3), **options}
    if backbone != "small":
        return faster_rcnn.FasterRCNN(_pyramid(backbone, norm), classes, **options)
    body = SmallBackbone()
    return faster_rcnn.FasterRCNN(
        body,
        rpn_anchor_generator=AnchorGenerator((SMALL_ANCHORS,), ((0.7, 1.0, 1.6),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=faster_rcnn.TwoMLPHead(body.out_channels * 49, 128),
        box_predictor=faster_rcnn.FastRCNNPredictor(128, classes),
        **options,
    )


BOX_OPTIONS = ("score_thresh", "nms_thresh", "detections_per_img")


class Prepared(nn.Module):  # type: ignore[misc]
    """In the place of torchvision's transform: images that are normalised, resized and padded already."""

    def forward(self, images: Any, targets: Any = None) -> tuple[ImageList, Any]:
        """`images` is a tensor `(n, 3, size, size)`; what is zero at its end was padded: no pixel becomes just that."""
        seen = (images != 0).any(1)
        heights, widths = (n - seen.any(d).flip(1).int().argmax(1) for n, d in zip(seen.shape[1:], (2, 1), strict=True))
        return ImageList(images, list(zip(heights.tolist(), widths.tolist(), strict=True))), targets

    def postprocess(self, result: Any, *sizes: Any) -> Any:
        """Detections as they are."""
        return result


class Floating(nn.Module):  # type: ignore[misc]
    """A head whose output is float32 under autocast too: bfloat16 knows coordinates above 128 to a whole pixel."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Any) -> Any:
        """The tensors of the head by name."""
        return {name: tensor.float() for name, tensor in self.head(features).items()}

    def compute_loss(self, *args: Any) -> Any:
        """The head's own."""
        return self.head.compute_loss(*args)


class Heads(nn.Module):  # type: ignore[misc]
    """Backbone and head of a one-stage detector: a tensor to the tuple of the head's tensors, sorted by name."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head
        self._whole = (detector,)  # in a tuple, so that its modules are not counted twice

    def forward(self, images: Any) -> tuple[Any, ...]:
        """Images `(n, 3, size, size)` to tensors `(n, anchors, …)`."""
        features = self.backbone(images)
        heads = self.head(list(features.values()) if isinstance(features, dict) else [features])
        return tuple(heads[name] for name in sorted(heads))

    def criterion(self) -> Callable[[Any, Any], Any]:
        """`(images, targets)` to the sum of torchvision's losses."""
        (detector,) = self._whole
        detector.transform, detector.head, detector.training = Prepared(), Floating(self.head), True
        return lambda images, targets: sum(detector(images, targets).values())


class TwoStages(nn.Module):  # type: ignore[misc]
    """Faster R-CNN, whole: a tensor to boxes `(n, most, 4)`, labels and scores `(n, most)`, padded with scores of -1.

    What its second stage looks at depends on what the first has found, which no graph of fixed shapes can hold.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        detector.transform = Prepared()
        self._whole = (detector,)

    def forward(self, images: Any) -> tuple[Any, ...]:
        """Images `(n, 3, size, size)` to their padded detections."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise UserError(
                "models.torchvision_detector faster_rcnn cannot be exported: its second stage depends on what the "
                "first has found; use fcos, retinanet, ssd or ssdlite"
            )
        (detector,) = self._whole
        detector.training = False
        padded = [_padded(found, self.roi_heads.detections_per_img) for found in detector(images)]
        return tuple(torch.stack([one[name] for one in padded]) for name in ("boxes", "labels", "scores"))

    def criterion(self) -> Callable[[Any, Any], Any]:
        """`(images, targets)` to the sum of torchvision's losses, all in float32."""
        (detector,) = self._whole

        def loss(images: Any, targets: Any) -> Any:
            detector.training = True
            with torch.autocast(images.device.type, enabled=False):
                return sum(detector(images, targets).values())

        return loss


def _padded(found: Mapping[str, Any], most: int) -> dict[str, Any]:
    missing = most - len(found["scores"])
    boxes = nn.functional.pad(found["boxes"], (0, 0, 0, missing))
    labels, scores = (nn.functional.pad(found[k].float(), (0, missing), value=-1.0) for k in ("labels", "scores"))
    return {"boxes": boxes, "labels": labels, "scores": scores}


class Selection:
    """What follows the heads, without a weight: anchors, boxes, scores, and which of them are reported."""

    def __init__(self, detector: Any, size: int) -> None:
        self.detector = detector.eval()
        self.transform = detector.transform
        self.names: list[str] = []
        if hasattr(detector, "head"):
            # Only the shapes of the feature maps matter; there, nothing is computed and nothing is held.
            features = detector.backbone.to("meta")(torch.empty(1, 3, size, size, device="meta"))
            maps = list(features.values()) if isinstance(features, dict) else [features]
            self.names = sorted(detector.head.to("meta")(maps))
            places = [m.shape[-2] * m.shape[-1] for m in maps]
            shapes = [torch.empty(1, 1, *m.shape[-2:]) for m in maps]
            self.anchors = detector.anchor_generator(ImageList(torch.empty(1, 3, size, size), [(size, size)]), shapes)[
                0
            ]
            each = len(self.anchors) // sum(places)
            self.levels = [n * each for n in places]
        self.detector.backbone = None

    def fit(self, images: Sequence[Any], targets: Any) -> tuple[Any, list[Any], Any]:
        """torchvision's transform: images uint8 `(h, w, 3)` in one square, what each takes of it, and targets."""
        floats = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in images]
        fitted, targets = self.transform(floats, targets)
        return fitted.tensors, fitted.image_sizes, targets

    def __call__(self, raw: Sequence[Any], fitted: Sequence[Any], sizes: Sequence[Any]) -> list[dict[str, Any]]:
        """torchvision's own selection on the tensors of `Heads` or `TwoStages`, in pixels of images of `sizes`."""
        if not self.names:
            boxes, labels, scores = raw
            found = [
                {"boxes": b[s >= 0], "labels": n[s >= 0].long(), "scores": s[s >= 0]}
                for b, n, s in zip(boxes, labels, scores, strict=True)
            ]
        else:
            heads: Any = dict(zip(self.names, raw, strict=True))
            anchors: Any = [self.anchors] * len(fitted)
            if isinstance(self.detector, fcos.FCOS | retinanet.RetinaNet):
                heads = {name: list(tensor.split(self.levels, 1)) for name, tensor in heads.items()}
                anchors = [list(each.split(self.levels)) for each in anchors]
            found = self.detector.postprocess_detections(heads, anchors, fitted)
        result: list[dict[str, Any]] = self.transform.postprocess(found, fitted, [tuple(s) for s in sizes])
        return result
