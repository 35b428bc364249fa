"""COCO annotation files: one JSON with images, annotations and categories."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from llmq.data.coco.boxed_images import Boxed, Item, Part, facts, within, without_copies
from llmq.errors import UserError
from llmq.guarded.files import read_json

Entry = Mapping[str, Any]
"""An image, an annotation or a category of the JSON."""
ANNOTATIONS = 2 * 2**30
"""The most bytes of an annotation file; the largest published ones of boxes have fewer."""
NEEDED: Mapping[str, Sequence[str]] = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def read_coco(file: Path, folder: Path | None) -> Part:
    """The images of an annotation file with their boxes, crowds marked; boxes without area are left out.

    `iscrowd` marks a crowd and `ignore` means nothing, as in pycocotools. Raises `UserError` naming file and annotation
    for a category or an image that is not there, a box outside its image, or an image of another size than the file
    says.
    """
    data = _read(file)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    labels = {category["id"]: number for number, category in enumerate(categories)}
    images = {image["id"]: image for image in data["images"]}
    folder = folder or _folder(file, data["images"])
    paths = {number: _path(file, folder, image) for number, image in images.items()}
    firsts: dict[Path, int] = {}
    for number, path in paths.items():  # each would be judged by a part of its boxes
        if (first := firsts.setdefault(path, number)) != number:
            raise UserError(
                f"{file}: images {first} and {number} are one file, {path.name!r}; keep one, with all annotations"
            )
    left_out = {"crowds_left_out": 0, "empty_boxes_left_out": 0}
    boxed: dict[int, list[Boxed]] = {number: [] for number in images}
    for annotation in data["annotations"]:
        where = f"{file}: annotation {annotation.get('id')}"
        number, category = annotation["image_id"], annotation["category_id"]
        if number not in images:
            raise UserError(f"{where}: there is no image {number!r} among 'images'; add it, or remove the annotation")
        if category not in labels:
            raise UserError(
                f"{where}: category_id {category!r} is not among 'categories' "
                f"({_few(labels)}); add it there, or correct the annotation"
            )
        size = images[number]["width"], images[number]["height"]
        box = within(_corners(annotation["bbox"], where), *size, f"{where}: bbox {annotation['bbox']}")
        if box is None:
            left_out["empty_boxes_left_out"] += 1
            continue
        crowd = annotation.get("iscrowd") or 0
        if crowd not in (0, 1):
            raise UserError(f"{where}: iscrowd {crowd!r} is neither 0 nor 1")
        left_out["crowds_left_out"] += crowd
        boxed[number].append(Boxed(box, labels[category], _area(annotation, where), bool(crowd)))
    items = [
        Item(str(image["file_name"]), paths[number], without_copies(boxed[number], left_out))
        for number, image in images.items()
    ]
    return Part(items, tuple(str(category["name"]) for category in categories), left_out)


def _read(file: Path) -> Mapping[str, list[Entry]]:
    data = read_json(file, ANNOTATIONS)
    if not isinstance(data, dict):
        raise UserError(f"{file}: holds no JSON object with images, annotations and categories")
    for name, keys in NEEDED.items():
        entries = data.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{file}: has no list of {name!r}, so it is no COCO annotation file of objects")
        seen: set[object] = set()
        for number, entry in enumerate(entries):
            where = f"{file}: {name}[{number}] (id {entry.get('id')!r})"
            if missing := [key for key in keys if key not in entry]:
                raise UserError(f"{where} has no {missing[0]!r}")
            if wrong := [key for key in keys if key.endswith("id") and not isinstance(entry[key], int)]:
                raise UserError(f"{where}: {wrong[0]} {entry[wrong[0]]!r} is no whole number")
            if name != "annotations" and entry["id"] in seen:
                raise UserError(f"{where}: another of the {name} has that id; give each its own")
            seen.add(entry.get("id"))
    return data


def _area(annotation: Entry, where: str) -> float | None:
    """The area of an object in square pixels, often that of the outline; None if the annotation has none."""
    area = annotation.get("area")
    if area is not None and not (type(area) in (int, float) and isfinite(area) and area >= 0):
        raise UserError(f"{where}: area {area!r} is no number of square pixels")
    return None if area is None else float(area)


def _corners(bbox: object, where: str) -> tuple[float, float, float, float]:
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(v, int | float) for v in bbox)):
        raise UserError(f"{where}: bbox {bbox!r} is not [x, y, width, height] in pixels")
    x, y, width, height = bbox
    return x, y, x + width, y + height


def _folder(file: Path, images: Sequence[Entry]) -> Path:
    """The folder of the images: the file's own, `images`, or `../val2017` for `annotations/instances_val2017.json`."""
    part, here, above = file.stem.rpartition("_")[2], file.parent, file.parent.parent
    places = [here, here / "images", above / part, above / "images" / part, here / part, above / "images"]
    first = str(images[0]["file_name"]) if images else ""
    return next((place for place in places if (place / first).is_file()), here)


def _path(file: Path, folder: Path, image: Entry) -> Path:
    path = folder / str(image["file_name"])
    if not path.is_file():
        raise UserError(
            f"{file}: image {image['id']}: there is no file {str(path)!r}; name their folder with 'images', "
            "or remove the image from the annotations"
        )
    width, height, _ = facts(path)
    if (width, height) != (image["width"], image["height"]):
        raise UserError(
            f"{file}: image {image['id']}: {path.name!r} is {width} x {height} pixels, and here it is "
            f"{image['width']} x {image['height']}; its boxes would not fit: correct the one or the other"
        )
    return path


def _few(labels: Mapping[int, int]) -> str:
    known = sorted(labels)
    return ", ".join(map(str, known)) if len(known) <= 12 else f"{known[0]} to {known[-1]}"
