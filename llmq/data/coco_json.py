"""Annotation files as COCO has them: one JSON with images, annotations and categories."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from llmq.data.boxed_images import Boxed, Item, Part, facts, within, without_copies
from llmq.errors import UserError
from llmq.guarded import json_files


def read_coco(file: Path, images: Path | None) -> Part:
    """The images of an annotation file with their boxes, crowds marked; boxes without area are left out.

    As pycocotools has it a crowd is what `iscrowd` says, and `ignore` says nothing.


    Raises `UserError` naming file and annotation for a category or an image that is not there, a box outside its
    image, or an image of another size than the file says.
    """
    data = _read(file)
    labels = {c["id"]: n for n, c in enumerate(sorted(data["categories"], key=lambda c: c["id"]))}
    classes = [str(c["name"]) for c in sorted(data["categories"], key=lambda c: c["id"])]
    folder = images or _folder(file, data["images"])
    paths = {image["id"]: _path(file, folder, image) for image in data["images"]}
    left_out = {"crowds_left_out": 0, "empty_boxes_left_out": 0}
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    found: dict[Any, list[Boxed]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        where = f"{file}: annotation {annotation.get('id')}"
        image_id = annotation.get("image_id")
        if image_id not in found:
            raise UserError(f"{where}: there is no image {image_id!r} among 'images'; add it, or remove the annotation")
        if annotation.get("category_id") not in labels:
            raise UserError(
                f"{where}: category_id {annotation.get('category_id')!r} is not among 'categories' "
                f"({_few(labels)}); add it there, or correct the annotation"
            )
        box = within(_corners(annotation.get("bbox"), where), *sizes[image_id], f"{where}: bbox {annotation['bbox']}")
        if box is None:
            left_out["empty_boxes_left_out"] += 1
            continue
        label, crowd = labels[annotation["category_id"]], bool(annotation.get("iscrowd"))
        left_out["crowds_left_out"] += crowd
        found[image_id].append(Boxed(box, label, _area(annotation, where), crowd))
    items = [
        Item(str(i["file_name"]), paths[i["id"]], without_copies(found[i["id"]], left_out)) for i in data["images"]
    ]
    return Part(items, tuple(classes), left_out)


def _area(annotation: Mapping[str, Any], where: str) -> float | None:
    """The object's own area, often that of its outline; None where the annotation says none."""
    area = annotation.get("area")
    if area is not None and not (type(area) in (int, float) and isfinite(area) and area >= 0):
        raise UserError(f"{where}: area {area!r} is no number of square pixels")
    return None if area is None else float(area)


ANNOTATIONS = 2 * 2**30
"""Bytes; the largest published annotations of boxes have less."""
NEEDED: Mapping[str, Sequence[str]] = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def _read(file: Path) -> dict[str, Any]:
    data = json_files.read(file, ANNOTATIONS)
    if not isinstance(data, dict):
        raise UserError(f"{file}: holds no JSON object with images, annotations and categories")
    for name, keys in NEEDED.items():
        entries = data.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{file}: has no list of {name!r}, so it is no COCO annotation file of objects")
        seen: set[Any] = set()
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


def _corners(bbox: Any, where: str) -> tuple[float, float, float, float]:
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(v, int | float) for v in bbox)):
        raise UserError(f"{where}: bbox {bbox!r} is not [x, y, width, height] in pixels")
    x, y, width, height = bbox
    return x, y, x + width, y + height


def _folder(file: Path, images: Sequence[Mapping[str, Any]]) -> Path:
    """Where the images of `annotations/instances_val2017.json` are: beside it, in `images`, or in `../val2017`."""
    part = file.stem.rpartition("_")[2]
    places = [file.parent, file.parent / "images", file.parent.parent / part, file.parent.parent / "images" / part]
    places += [file.parent / part, file.parent.parent / "images"]
    first = str(images[0]["file_name"]) if images else ""
    return next((place for place in places if (place / first).is_file()), file.parent)


def _path(file: Path, folder: Path, image: Mapping[str, Any]) -> Path:
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


def _few(labels: Mapping[Any, int]) -> str:
    known = sorted(labels)
    return ", ".join(map(str, known)) if len(known) <= 12 else f"{known[0]} to {known[-1]}"
