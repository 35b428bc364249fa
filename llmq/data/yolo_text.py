"""Annotations as YOLO has them: a `data.yaml`, and beside each image a text file with a line for each box."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq.data.boxed_images import Boxed, Item, Part, facts, within, without_copies
from llmq.data.folders import under
from llmq.errors import UserError
from llmq.guarded.files import read_text
from llmq.source import read

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def find_yaml(path: Path) -> Path:
    """The `data.yaml` that a path means: itself, or the one in the folder. Raises `UserError` if there is none."""
    if path.is_dir():
        found = [path / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (path / name).is_file()]
        if not found:
            raise UserError(
                f"{str(path)!r} has no data.yaml; name a folder that has one (with train, val and names), "
                "or a COCO annotation file"
            )
        return found[0]
    return path


def read_yolo(file: Path) -> dict[str, Part]:
    """The parts `train` and `val` (where there is one) of a `data.yaml`.

    An image without a text file has no box. Raises `UserError` naming file and line for a category that is not among
    the names, a line that is no box, or a box outside its image.
    """
    about = _read(file)
    classes = _classes(file, about["names"])
    root = (file.parent / str(about.get("path", "."))).resolve()
    return {
        part: _part(file, part, *_images(file, root, part, about[part]), classes)
        for part in ("train", "val")
        if about.get(part)
    }


def _read(file: Path) -> dict[str, Any]:
    about = read(file).data
    if not isinstance(about, dict) or not about.get("names") or not about.get("train"):
        raise UserError(f"{file}: has no 'names' or no 'train'; a YOLO data set says its classes and its folders there")
    return about


def _classes(file: Path, names: Any) -> tuple[str, ...]:
    if isinstance(names, dict) and set(names) == set(map(str, range(len(names)))):
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, list):
        raise UserError(f"{file}: names: {names!r} is no list, and no mapping of 0 to the last class; write one")
    return tuple(map(str, names))


def _images(
    file: Path, root: Path, part: str, written: str | Sequence[str]
) -> tuple[list[tuple[str, Path]], dict[str, int]]:
    """The images of a part with their names, and what was left out of its folders."""
    found: list[tuple[str, Path]] = []
    left_out: Counter[str] = Counter()
    for name in [written] if isinstance(written, str) else written:
        place = root / str(name)
        if place.is_dir():
            its = under(place, SUFFIXES)
            paths = its.images
            left_out += its.left_out
        elif place.is_file():
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            paths = [place.parent / line for line in lines]
            if missing := [n for n, path in enumerate(paths) if not path.is_file()]:
                raise UserError(f"{place}:{missing[0] + 1}: there is no image {str(paths[missing[0]])!r}")
        else:
            raise UserError(f"{file}: {part}: there is no folder {str(place)!r}; correct it, or set 'path' there")
        found += [(str(path.relative_to(root)) if path.is_relative_to(root) else path.name, path) for path in paths]
    if not found:
        raise UserError(f"{file}: {part}: no image in {written!r}")
    del left_out["no_image"]  # the text files with the boxes lie there, too
    return found, dict(left_out)


def _part(
    file: Path, part: str, images: Sequence[tuple[str, Path]], left_out: dict[str, int], classes: tuple[str, ...]
) -> Part:
    left_out = {"empty_boxes_left_out": 0, **left_out}
    items = []
    if not any(label_file(path).is_file() for _, path in images):
        expected = str(label_file(images[0][1]))
        raise UserError(f"{file}: {part}: no image has a text file with its boxes; the first should be {expected!r}")
    for name, path in images:
        items.append(Item(name, path, without_copies(_boxes(path, classes, left_out), left_out)))
    return Part(items, classes, left_out)


def label_file(image: Path) -> Path:
    """`…/labels/a.txt` of `…/images/a.jpg`, the last `images` of the path counting; else beside the image."""
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _boxes(image: Path, classes: Sequence[str], left_out: dict[str, int]) -> list[Boxed]:
    width, height, _ = facts(image)
    file = label_file(image)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    found: list[Boxed] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            label, (x, y, w, h) = _numbers(line, f"{file}:{number}", classes)
            corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            box = within(corners, width, height, f"{file}:{number}: the box {line.strip()!r}")
            if box is None:
                left_out["empty_boxes_left_out"] += 1
            else:
                found.append(Boxed(box, label))
    return found


def _numbers(line: str, where: str, classes: Sequence[str]) -> tuple[int, tuple[float, ...]]:
    cells = line.split()
    try:
        label, box = int(cells[0]), tuple(float(cell) for cell in cells[1:])
    except ValueError:
        raise UserError(f"{where}: {line.strip()!r} is not 'class x y width height' in numbers") from None
    if len(box) != 4:
        raise UserError(
            f"{where}: {line.strip()!r} has {len(box)} numbers after its class, and a box has 4: x, y, width, height "
            "as shares of the image"
        )
    if not 0 <= label < len(classes):
        raise UserError(
            f"{where}: class {label} is not among the {len(classes)} names, which count from 0; add it there"
        )
    return label, box
