"""torchvision's detectors in two parts: backbone and heads, which are exported, and the selection that follows.

A detector of torchvision is backbone, heads, anchors, losses and selection in one. `Heads` holds all weights, under
torchvision's own names; `Selection` is the rest, and turns the outputs of the heads into detections.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, mobilenet, resnet
from torchvision.models.detection import backbone_utils, faster_rcnn, fcos, retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from llmq.errors import UserError

if TYPE_CHECKING:
    from llmq.vision.detector import Criterion, Fitted, Images, Sizes, Targets

Untyped = Any
"""A part of torchvision, which has no types."""
Options = Mapping[str, Untyped]
Norm = Callable[..., nn.Module]
Found = Mapping[str, Tensor]
"""Boxes, labels and scores of one image."""
SMALL_ANCHORS = (10.0, 16.0, 26.0, 42.0)  # pixels; a detector on the small backbone has one level


class SmallBackbone(nn.Sequential):
    """Two strided convolutions and two residual blocks: 0.3 M parameters, one feature map at stride 8."""

    def __init__(self, channels: int = 96, out_channels: int = 64) -> None:
        half = channels // 2
        shortcut = nn.Sequential(nn.Conv2d(half, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))
        super().__init__(
            *_conv(3, channels // 4),  # stride 2
            *_conv(channels // 4, half),  # stride 4
            resnet.BasicBlock(half, channels, 2, shortcut),  # stride 8 from here on
            resnet.BasicBlock(channels, channels),
            nn.Conv2d(channels, out_channels, 1),
        )
        self.out_channels = out_channels


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def build(architecture: str, backbone: str, classes: int, size: int, coco: bool, options: Options) -> Untyped:
    """A detector of torchvision with random weights, for images in a square of `size`.

    With `coco` batch normalisation is fixed, as in torchvision's weights for COCO.
    """
    square = {"min_size": size, "max_size": size, "size_divisible": size}
    if architecture in ("ssd", "ssdlite"):
        name = {"ssd": "ssd300_vgg16", "ssdlite": "ssdlite320_mobilenet_v3_large"}[architecture]
        return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=classes, **options)
    # The first COCO weights of these two were trained without an epsilon under the root.
    eps = 0.0 if architecture in ("retinanet", "faster_rcnn") and backbone == "resnet50" else 1e-5
    norm = partial(FrozenBatchNorm2d, eps=eps) if coco else nn.BatchNorm2d
    builder = {"fcos": _fcos, "retinanet": _retinanet, "faster_rcnn": _faster_rcnn}[architecture]
    return builder(backbone, classes, norm, {**square, **options})


def _pyramid(name: str, norm: Norm, **levels: Untyped) -> Untyped:
    if name.startswith("mobilenet"):
        return backbone_utils._mobilenet_extractor(getattr(mobilenet, name)(weights=None, norm_layer=norm), True, 6)
    return backbone_utils._resnet_fpn_extractor(getattr(resnet, name)(weights=None, norm_layer=norm), 5, **levels)


def _one_stage_pyramid(name: str, norm: Norm) -> Untyped:
    return _pyramid(name, norm, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))


def _fcos(backbone: str, classes: int, norm: Norm, options: Options) -> Untyped:
    if backbone != "small":
        return fcos.FCOS(_one_stage_pyramid(backbone, norm), classes, **options)
    body = SmallBackbone()
    head = fcos.FCOSHead(body.out_channels, 1, classes, num_convs=1)
    # Batch normalisation can be folded into the convolution before it; torchvision's group normalisation cannot.
    head.classification_head = fcos.FCOSClassificationHead(body.out_channels, 1, classes, 1, norm_layer=nn.BatchNorm2d)
    head.regression_head = fcos.FCOSRegressionHead(body.out_channels, 1, 1, norm_layer=nn.BatchNorm2d)
    return fcos.FCOS(body, classes, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)), head=head, **options)


def _retinanet(backbone: str, classes: int, norm: Norm, options: Options) -> Untyped:
    if backbone != "small":
        return retinanet.RetinaNet(_one_stage_pyramid(backbone, norm), classes, **options)
    body = SmallBackbone()
    head = retinanet.RetinaNetHead(body.out_channels, 12, classes, norm_layer=nn.BatchNorm2d)
    return retinanet.RetinaNet(body, classes, anchor_generator=_small_anchors(), head=head, **options)


def _small_anchors() -> AnchorGenerator:
    return AnchorGenerator((SMALL_ANCHORS,), ((0.7, 1.0, 1.6),))


def _faster_rcnn(backbone: str, classes: int, norm: Norm, options: Options) -> Untyped:
    options = {f"box_{name}" if name in BOX_OPTIONS else name: value for name, value in options.items()}
    if backbone == "mobilenet_v3_large":
        sizes = ((32, 64, 128, 256, 512),) * 3
        options = {"rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3), **options}
    if backbone != "small":
        return faster_rcnn.FasterRCNN(_pyramid(backbone, norm), classes, **options)
    body = SmallBackbone()
    return faster_rcnn.FasterRCNN(
        body,
        rpn_anchor_generator=_small_anchors(),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=faster_rcnn.TwoMLPHead(body.out_channels * 49, 128),
        box_predictor=faster_rcnn.FastRCNNPredictor(128, classes),
        **options,
    )


BOX_OPTIONS = ("score_thresh", "nms_thresh", "detections_per_img")


class Prepared(nn.Module):
    """A stand-in for torchvision's transform, for images that are normalised, resized and padded already."""

    def forward(self, images: Tensor, targets: "Targets | None" = None) -> "tuple[ImageList, Targets | None]":
        """Measure the images in `(n, 3, size, size)`: zeros at the end are padding, as no pixel is exactly zero."""
        seen = (images != 0).any(1)  # (n, size, size)
        sides = (n - seen.any(d).flip(1).int().argmax(1) for n, d in zip(seen.shape[1:], (2, 1), strict=True))
        # A traced size stays a tensor, or it would be that of the traced image for good.
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        heights, widths = (list(n) if traced else n.tolist() for n in sides)
        return ImageList(images, list(zip(heights, widths, strict=True))), targets

    def postprocess(self, result: list[Found], *sizes: object) -> list[Found]:
        return result


class Floating(nn.Module):
    """A head with float32 output even under autocast: bfloat16 holds coordinates above 128 to a whole pixel only."""

    def __init__(self, head: Untyped) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in self.head(features).items()}

    def compute_loss(self, *args: object) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.head.compute_loss(*args)
        return losses


class Heads(nn.Module):
    """The backbone and head of a one-stage detector: images to the tuple of the head's tensors, sorted by name."""

    def __init__(self, detector: Untyped) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head
        self._whole = (detector,)  # in a tuple, so that its modules are not counted twice

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images `(n, 3, size, size)` to tensors `(n, anchors, …)`."""
        heads = self.head(_maps(self.backbone(images)))
        return tuple(heads[name] for name in sorted(heads))

    def criterion(self) -> "Criterion":
        """The sum of torchvision's losses, as a function of images and targets."""
        (detector,) = self._whole
        detector.transform, detector.head, detector.training = Prepared(), Floating(self.head), True
        return lambda images, targets: sum(detector(images, targets).values())


class SquareAlign(nn.Module):
    """torchvision's pooling of boxes, told the padded square that the feature maps are of.

    It would infer their strides from the first image it sees, without its padding, and keep them.
    """

    def __init__(self, pool: nn.Module, side: int) -> None:
        super().__init__()
        self.pool, self.side = pool, side

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: object) -> Tensor:
        pooled: Tensor = self.pool(maps, boxes, [(self.side, self.side)])
        return pooled


class TwoStages(nn.Module):
    """Faster R-CNN, whole: images to boxes `(n, most, 4)`, labels and scores `(n, most)`, padded with scores of -1.

    The input of the second stage depends on the result of the first: of all graphs ONNX alone can hold it.
    """

    def __init__(self, detector: Untyped, side: int) -> None:
        super().__init__()
        detector.roi_heads.box_roi_pool = SquareAlign(detector.roi_heads.box_roi_pool, side)
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        detector.transform = Prepared()
        self._whole = (detector,)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        traced = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if traced and not torch.onnx.is_in_onnx_export():
            raise UserError(
                "models.torchvision_detector faster_rcnn has no graph of OpenVINO: its second stage depends on the "
                "objects that the first finds; use fcos, retinanet, ssd or ssdlite, or take it to export.onnx as it is"
            )
        (detector,) = self._whole
        detector.training = False
        padded = [_padded(found, self.roi_heads.detections_per_img) for found in detector(images)]
        return tuple(torch.stack([one[name] for one in padded]) for name in ("boxes", "labels", "scores"))

    def criterion(self) -> "Criterion":
        """The sum of torchvision's losses, as a function of images and targets, all in float32."""
        (detector,) = self._whole

        def loss(images: Tensor, targets: "Targets") -> Tensor:
            detector.training = True
            with torch.autocast(images.device.type, enabled=False):
                total: Tensor = sum(detector(images, targets).values())
            return total

        return loss


def _padded(found: Found, most: int) -> dict[str, Tensor]:
    # Padded by `most` and cut again: a count of what was found would be a constant in a traced graph.
    boxes = nn.functional.pad(found["boxes"], (0, 0, 0, most))[:most]  # (most, 4)
    labels, scores = (nn.functional.pad(found[k].float(), (0, most), value=-1.0)[:most] for k in ("labels", "scores"))
    return {"boxes": boxes, "labels": labels, "scores": scores}


def _maps(features: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    """The feature maps of a backbone as a list, be it one or several."""
    return [features] if isinstance(features, Tensor) else list(features.values())


class Selection:
    """The part after the heads, without weights: anchors, boxes, scores, and the selection of detections."""

    def __init__(self, detector: Untyped, size: int) -> None:
        self.detector = detector.eval()
        self.transform = detector.transform
        self.names: list[str] = []
        if hasattr(detector, "head"):
            # Only the shapes of the feature maps matter: the meta device computes and holds nothing.
            maps = _maps(detector.backbone.to("meta")(torch.empty(1, 3, size, size, device="meta")))
            self.names = sorted(detector.head.to("meta")(maps))
            places = [m.shape[-2] * m.shape[-1] for m in maps]
            shapes = [torch.empty(1, 1, *m.shape[-2:]) for m in maps]
            image = ImageList(torch.empty(1, 3, size, size), [(size, size)])
            self.anchors: Tensor = detector.anchor_generator(image, shapes)[0]  # (anchors, 4)
            each = len(self.anchors) // sum(places)
            self.levels = [n * each for n in places]
        self.detector.backbone = None

    def fit(self, images: "Images", targets: "Targets | None") -> "Fitted":
        """torchvision's transform of uint8 images `(h, w, 3)`: the input, the sizes of images there, and targets.

        Raises `UserError` for an image so long that nothing of the shorter side would be left.
        """
        side = self.transform.max_size
        kept = self.transform.fixed_size is None  # proportions
        for height, width, _ in (image.shape for image in images):
            if kept and min(height, width) * side < max(height, width):
                raise UserError(
                    f"an image of {width} x {height} pixels is too long for a square of {side} that keeps proportions; "
                    "cut it, or leave it out"
                )
        floats = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in images]
        fitted, targets = self.transform(floats, targets)
        return fitted.tensors, fitted.image_sizes, targets  # tensors (n, 3, size, size)

    def __call__(self, raw: Sequence[Tensor], fitted: "Sizes", sizes: "Sizes") -> list[Found]:
        """Select detections from the tensors of `Heads` or `TwoStages`, in pixels of images of `sizes`."""
        if not self.names:
            boxes, labels, scores = raw  # (n, most, 4), (n, most), (n, most)
            found = [
                {"boxes": b[s >= 0], "labels": n[s >= 0].long(), "scores": s[s >= 0]}
                for b, n, s in zip(boxes, labels, scores, strict=True)
            ]
        else:
            heads: Untyped = dict(zip(self.names, raw, strict=True))
            anchors: Untyped = [self.anchors] * len(fitted)
            if isinstance(self.detector, fcos.FCOS | retinanet.RetinaNet):  # these two select level by level
                heads = {name: list(tensor.split(self.levels, 1)) for name, tensor in heads.items()}
                anchors = [list(each.split(self.levels)) for each in anchors]
            found = self.detector.postprocess_detections(heads, anchors, fitted)
        result: list[Found] = self.transform.postprocess(found, fitted, [tuple(s) for s in sizes])
        return result
