"""The objects in pictures: `detections.json` in COCO's shape, and each picture with its boxes."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from llmq.files import write_json
from llmq.predictors import PICTURES, Input, Inputs, Predictor
from llmq.terminal import track
from llmq.types import JsonObject
from llmq.vision.images import read_image
from llmq.vision.pixels import check_window

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.types import Loaded
    from llmq.vision.detector import Detections

BATCH = 16  # pictures in memory
FILE = "detections.json"


class Detecting(Predictor):
    suffixes: ClassVar[frozenset[str]] = PICTURES

    threshold: float = Field(0.3, ge=0, lt=1, description="the least score of a detection that is written and drawn")
    window: tuple[float, float] | None = Field(
        None, description="numbers that become grey levels 0 and 255; the run's, else needed for more than 8 bits"
    )

    names: Mapping[int, str] = Field({}, description="of the labels, where the weights name none")

    def check(self, item: Input, model: object) -> None:
        check_window(self.window)
        read_image(item.path, 3, self.window)

    def targets(self, item: Input) -> list[Path]:
        place = item.place
        return [place if place.suffix.lower() == ".png" else place.with_name(f"{place.name}.png")]

    def write(self, loaded: Loaded, inputs: Inputs, folder: Path) -> int:
        """Write `detections.json` and the pictures as PNG; returns the number of detections.

        A box of an annotation is x, y, width, height in pixels; a category has the number of the network's label.
        """
        model: Any = loaded.artifact.model.model_copy(update={"score_threshold": self.threshold})
        images: list[JsonObject] = []
        found: list[JsonObject] = []
        names = dict(enumerate(model.class_names())) or self.names
        for begin in track(range(0, len(inputs.items), BATCH), "detecting"):
            items = inputs.items[begin : begin + BATCH]
            pixels = [read_image(item.path, 3, self.window) for item in items]
            for item, image, objects in zip(items, pixels, model.detect(loaded, pixels, BATCH), strict=True):
                height, width = image.shape[:2]
                images.append({"id": len(images) + 1, "file_name": item.name, "width": width, "height": height})
                found += _annotations(objects, len(images), len(found) + 1)
                _draw(image, objects, names, folder / self.targets(item)[0])
        labels = sorted({*names, *(each["category_id"] for each in found)})
        categories = [{"id": label, "name": names.get(label, str(label))} for label in labels]
        write_json(folder / FILE, {"images": images, "categories": categories, "annotations": found})
        return len(found)


def _annotations(objects: Detections, image: int, first: int) -> list[JsonObject]:
    made: list[JsonObject] = []
    for box, score, label in zip(objects.boxes, objects.scores, objects.labels, strict=True):
        x0, y0, x1, y1 = (float(each) for each in box)
        made.append(
            {
                "id": first + len(made),
                "image_id": image,
                "category_id": int(label),
                "bbox": [round(each, 3) for each in (x0, y0, x1 - x0, y1 - y0)],
                "area": round((x1 - x0) * (y1 - y0), 3),
                "iscrowd": 0,
                "score": round(float(score), 6),
            }
        )
    return made


def _draw(image: ndarray, objects: Detections, names: Mapping[int, str], target: Path) -> None:
    """Save a picture with its boxes, each under the label and the score; a label has one colour everywhere."""
    from PIL import Image, ImageDraw

    shown = Image.fromarray(image)
    pen = ImageDraw.Draw(shown)
    thick = max(1, round(max(image.shape[:2]) / 400))
    for box, score, label in reversed(list(zip(objects.boxes, objects.scores, objects.labels, strict=True))):
        # Hues a golden section apart are never close for neighbouring labels.
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(int(label) * 0.618 % 1, 0.9, 1.0))
        x0, y0, x1, y1 = (float(each) for each in box)
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=thick)
        text = f"{names.get(int(label), int(label))} {score:.2f}".encode("latin-1", "replace").decode("latin-1")
        at = (x0 + thick + 1, max(0.0, y0 + thick))
        pen.rectangle(pen.textbbox(at, text), fill=colour)
        pen.text(at, text, fill=(0, 0, 0))
    target.parent.mkdir(parents=True, exist_ok=True)
    shown.save(target, "PNG")
