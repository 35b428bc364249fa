"""YOLO annotations: a `data.yaml`, and beside each image a text file with a line for each box."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llmq.data.coco.boxed_images import Boxed, Item, Part, facts, within, without_copies
from llmq.errors import UserError
from llmq.guarded.files import read_text
from llmq.source import read
from llmq.types import JsonObject
from llmq.vision.folders import under

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def find_yaml(path: Path) -> Path:
    """The `data.yaml` of a folder, or any other path unchanged. Raises `UserError` for a folder without one."""
    if not path.is_dir():
        return path
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{str(path)!r} has no data.yaml; name a folder that has one (with train, val and names), "
        "or a COCO annotation file"
    )


def read_yolo(file: Path) -> list[Part]:
    """The parts `train` and `val` (where there is one) of a `data.yaml`.

    An image without a text file has no box. Raises `UserError` naming file and line for a category that is not among
    the names, a line that is no box, or a box outside its image.
    """
    about = read(file).data
    if not isinstance(about, dict) or not about.get("names") or not about.get("train"):
        raise UserError(f"{file}: has no 'names' or no 'train'; a YOLO data set says its classes and its folders there")
    return [_part(file, name, about) for name in ("train", "val") if about.get(name)]


def _part(file: Path, name: str, about: JsonObject) -> Part:
    classes = _classes(file, about["names"])
    if about.get("nc", len(classes)) != len(classes):
        raise UserError(
            f"{file}: nc is {about['nc']!r}, and names tells of {len(classes)} classes; correct one of them"
        )
    root = (file.parent / str(about.get("path", "."))).resolve()
    images, others = _images(file, root, name, about[name])
    if not any(label_file(path).is_file() for _, path in images):
        expected = str(label_file(images[0][1]))
        raise UserError(f"{file}: {name}: no image has a text file with its boxes; the first should be {expected!r}")
    left_out = {"empty_boxes_left_out": 0, **others}
    items = [Item(called, path, without_copies(_boxes(path, classes, left_out), left_out)) for called, path in images]
    return Part(items, classes, left_out)


def _classes(file: Path, names: object) -> tuple[str, ...]:
    if isinstance(names, dict) and set(names) == set(map(str, range(len(names)))):
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, list):
        raise UserError(f"{file}: names: {names!r} is no list, and no mapping of 0 to the last class; write one")
    if (odd := next((n for n in names if isinstance(n, bool) or n is None), "")) != "":
        raise UserError(f"{file}: names: YAML reads one of them as {odd}; write it in quotes, such as 'no'")
    return tuple(map(str, names))


def _images(
    file: Path, root: Path, part: str, written: str | Sequence[str]
) -> tuple[list[tuple[str, Path]], dict[str, int]]:
    """The images of a part with their names, and the counts of other files in the folders."""
    images: list[tuple[str, Path]] = []
    left_out: Counter[str] = Counter()
    for name in [written] if isinstance(written, str) else written:
        place = root / str(name)
        if place.is_dir():
            files = under(place, SUFFIXES)
            paths = files.images
            left_out += files.left_out
        elif place.is_file():
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            paths = [place.parent / line for line in lines]
            if missing := [n for n, path in enumerate(paths) if not path.is_file()]:
                raise UserError(f"{place}:{missing[0] + 1}: there is no image {str(paths[missing[0]])!r}")
        else:
            raise UserError(f"{file}: {part}: there is no folder {str(place)!r}; correct it, or set 'path' there")
        images += [(str(path.relative_to(root)) if path.is_relative_to(root) else path.name, path) for path in paths]
    if not images:
        raise UserError(f"{file}: {part}: no image in {written!r}")
    del left_out["no_image"]  # the text files with the boxes lie there, too
    return images, dict(left_out)


def label_file(image: Path) -> Path:
    """`…/labels/a.txt` of `…/images/a.jpg`, the last `images` of the path counting; else beside the image."""
    *parts, name = image.parts
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, name).with_suffix(".txt")


def _boxes(image: Path, classes: Sequence[str], left_out: dict[str, int]) -> list[Boxed]:
    width, height, _ = facts(image)
    file = label_file(image)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    boxes = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            label, (x, y, w, h) = _numbers(line, f"{file}:{number}", classes)
            corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            box = within(corners, width, height, f"{file}:{number}: the box {line.strip()!r}")
            if box is None:
                left_out["empty_boxes_left_out"] += 1
            else:
                boxes.append(Boxed(box, label))
    return boxes


def _numbers(line: str, where: str, classes: Sequence[str]) -> tuple[int, tuple[float, ...]]:
    cells = line.split()
    try:
        label, box = int(cells[0]), tuple(map(float, cells[1:]))
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
