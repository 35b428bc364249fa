"""Scenes of digits, and images with boxes as COCO and as YOLO write them."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llmq import plugin
from llmq.data.coco.boxed_images import facts, within
from llmq.data.coco.yolo import label_file
from llmq.data.scenes import FROM_THE_END, Scenes, _read
from llmq.data.scenes.painter import Difficulty, glyphs, paint
from llmq.errors import UserError

PLAIN = Difficulty(size=96, digits=(1, 5), scale=(12, 40), contrast=(0.9, 1), overlap=0, clutter=0, noise=0, tilt=10)


def read(word: str, **its: Any) -> Any:
    """A data set, checked as a recipe does."""
    data: Any = plugin.build({word: its}, "data")
    data.check()
    return data.read()


def test_scenes_are_the_same_under_a_seed_and_others_under_another():
    first = [e.image for e in paint_some(Scenes(train=3, held_out=2, seed=4))]
    _read.cache_clear()
    again = [e.image for e in paint_some(Scenes(train=3, held_out=2, seed=4))]
    other = [e.image for e in paint_some(Scenes(train=3, held_out=2, seed=5))]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert Scenes(seed=4).read().sha256 != Scenes(seed=5).read().sha256


def paint_some(scenes: Scenes) -> list[Any]:
    """All scenes of both parts."""
    split = scenes.read()
    return [*split.train, *split.held_out]


def test_scenes_are_what_a_detector_takes():
    split = read("scenes", train=20, held_out=10)
    assert split.shape == "image/boxes"
    assert split.classes == tuple("0123456789")
    assert split.counts == {"read": 30, "train": 20, "held_out": 10}
    for example in [*split.train, *split.held_out]:
        assert example.image.shape == (128, 128, 3)
        assert example.image.dtype == np.uint8
        assert example.boxes.dtype == np.float32
        assert example.labels.dtype == np.int64
        assert 0 < len(example.boxes) == len(example.labels) <= 8
        assert (example.boxes[:, :2] >= 0).all()
        assert (example.boxes[:, 2:] <= 128).all()


def test_held_out_scenes_show_digits_that_are_never_learned_from(monkeypatch):
    drawn: dict[str, set[int]] = {"train": set(), "held_out": set()}

    def spy(name, seed, sources, how):
        drawn[name.split("/")[0]] |= set(sources)
        return paint(name, seed, sources, how)

    monkeypatch.setattr("llmq.data.scenes.paint", spy)
    paint_some(Scenes(train=2, held_out=2, seed=77))
    assert drawn["train"].isdisjoint(drawn["held_out"])
    assert len(drawn["held_out"]) == FROM_THE_END
    assert set(glyphs()[1][sorted(drawn["held_out"])]) == set(range(10))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_box_hugs_the_ink_on_a_plain_canvas(seed):
    how = Difficulty(**{**PLAIN.__dict__, "digits": (1, 1)})
    blank = Difficulty(**{**how.__dict__, "digits": (0, 0)})
    scene, canvas = (paint("x", (seed,), range(100), d) for d in (how, blank))
    (box,) = scene.boxes.astype(int)
    changed = np.abs(scene.image.astype(int) - canvas.image).max(-1)
    ys, xs = np.nonzero(changed > 0.5 * changed.max())
    assert (xs.min() >= box[0]) & (ys.min() >= box[1]) & (xs.max() < box[2]) & (ys.max() < box[3])
    assert abs(box - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).max() <= 6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_digits_without_overlap_do_not_touch(seed):
    boxes = paint("x", (seed,), range(100), PLAIN).boxes
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            assert (sides <= 0).any()


@pytest.mark.parametrize(
    ("its", "message"),
    [
        ({"scale": [40, 10]}, "scale [40, 10] must rise and lie within 6 and 128"),
        ({"scale": [10, 200]}, "scale [10, 200] must rise and lie within 6 and 128"),
        ({"contrast": [0, 1]}, "contrast [0, 1] must rise and lie within 0.05 and 1"),
        ({"digits": [3, 1]}, "digits [3, 1] must rise and lie within 0 and 100"),
    ],
)
def test_ranges_of_scenes_are_checked(its, message):
    with pytest.raises(UserError) as error:
        read("scenes", **its)
    assert str(error.value) == message


BOXES = {"a.png": [(2, 3, 10, 8, 7), (0, 0, 40, 30, 3)], "b.png": [(5, 5, 4, 4, 3)], "c.png": []}


def images_in(folder: Path, names: Any = BOXES) -> None:
    """Noise of 40 x 30 pixels under each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        seed = zlib.crc32(str(folder / name).encode())
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def coco_in(folder: Path, boxes: Any = BOXES, **changes: Any) -> Path:
    """A COCO file in `folder`, its images beside it; `changes` replace parts of it."""
    images_in(folder / "images", boxes)
    images = [{"id": n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(boxes, 1)]
    annotations = [
        {"id": 100 * n + k, "image_id": n, "category_id": c, "bbox": [x, y, w, h], "iscrowd": 0}
        for n, its in enumerate(boxes.values(), 1)
        for k, (x, y, w, h, c) in enumerate(its)
    ]
    categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
    data = {"images": images, "annotations": annotations, "categories": categories, **changes}
    (folder / "instances.json").write_text(json.dumps(data, indent=1))
    return folder / "instances.json"


def yolo_in(
    folder: Path, lines: str = "1 0.175 0.233333 0.25 0.266667\n0 0.5 0.5 1 1\n", parts: Any = ("train",)
) -> Path:
    """A YOLO data set with three images in each part; only the first has lines."""
    for part in parts:
        images_in(folder / "images" / part)
        (folder / "labels" / part).mkdir(parents=True)
        (folder / "labels" / part / "a.txt").write_text(lines)
    about = "".join(f"{part}: images/{part}\n" for part in parts) + "names: {0: three, 1: seven}\n"
    (folder / "data.yaml").write_text(about)
    return folder


def test_coco_and_yolo_say_the_same(tmp_path):
    coco = read("coco", path=str(coco_in(tmp_path / "c")), held_out=0.4)
    yolo = read("coco", path=str(yolo_in(tmp_path / "y", parts=("train", "val"))))
    assert coco.classes == yolo.classes == ("three", "seven")
    assert coco.shape == yolo.shape == "image/boxes"
    assert coco.counts == {"read": 3, "train": 2, "held_out": 1, "crowds_left_out": 0, "empty_boxes_left_out": 0}
    assert yolo.counts == {"read": 6, "train": 3, "held_out": 3, "empty_boxes_left_out": 0}
    of_coco = next(e for e in [*coco.train, *coco.held_out] if e.name == "a.png")
    of_yolo = yolo.train[0]
    np.testing.assert_allclose(of_coco.boxes, [[2, 3, 12, 11], [0, 0, 40, 30]])
    np.testing.assert_allclose(of_yolo.boxes, of_coco.boxes, atol=1e-4)
    assert of_coco.labels.tolist() == of_yolo.labels.tolist() == [1, 0]
    assert of_coco.image.shape == (30, 40, 3)
    assert next(e for e in [*coco.train, *coco.held_out] if e.name == "c.png").boxes.shape == (0, 4)


def test_a_second_coco_file_is_held_out_and_shares_no_image(tmp_path):
    train = coco_in(tmp_path / "one")
    held_out = coco_in(tmp_path / "second", {"d.png": [(1, 1, 5, 5, 3)]})
    split = read("coco", path=str(train), held_out=str(held_out))
    assert [len(split.train), len(split.held_out)] == [3, 1]
    with pytest.raises(UserError, match="the same image as"):
        read("coco", path=str(train), held_out=str(train))


def test_copies_of_an_image_fall_on_one_side(tmp_path):
    file = coco_in(tmp_path, {f"{n}.png": [] for n in range(10)})
    for n in range(1, 10):
        (tmp_path / "images" / f"{n}.png").write_bytes((tmp_path / "images" / f"{n % 2}.png").read_bytes())
    split = read("coco", path=str(file), held_out=0.3)
    assert sorted([len(split.train), len(split.held_out)]) == [5, 5]


def test_crowds_and_empty_boxes_are_left_out_and_counted(tmp_path):
    file = coco_in(tmp_path)
    data = json.loads(file.read_text())
    data["annotations"][0]["iscrowd"] = 1
    data["annotations"][1]["bbox"] = [3, 3, 0, 5]
    file.write_text(json.dumps(data))
    split = read("coco", path=str(file), held_out=0.4)
    assert split.counts["crowds_left_out"] == 1
    assert split.counts["empty_boxes_left_out"] == 1
    assert sum(len(e.boxes) for e in [*split.train, *split.held_out]) == 1


def bad_coco(folder: Path, change: Any) -> str:
    """What is said of a COCO file after `change(data)`."""
    file = coco_in(folder)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        read("coco", path=str(file))
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(folder), "")


def first(data: Any, part: str, **changes: Any) -> None:
    """Change the first entry of a part."""
    data[part][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: first(d, "annotations", bbox=[35, 3, 10, 8]),
            "/instances.json: annotation 100: bbox [35, 3, 10, 8] spans x 35 to 45 and y 3 to 11, outside its image of "
            "40 x 30 pixels; clip it, or look for the image that it belongs to",
        ),
        (
            lambda d: first(d, "annotations", bbox=[5, 3, -1, 8]),
            "/instances.json: annotation 100: bbox [5, 3, -1, 8] has no finite, positive size",
        ),
        (
            lambda d: first(d, "annotations", bbox="1 2 3 4"),
            "/instances.json: annotation 100: bbox '1 2 3 4' is not [x, y, width, height] in pixels",
        ),
        (
            lambda d: first(d, "annotations", category_id=8),
            "/instances.json: annotation 100: category_id 8 is not among 'categories' (3, 7); add it there, or correct "
            "the annotation",
        ),
        (
            lambda d: first(d, "annotations", image_id=9),
            "/instances.json: annotation 100: there is no image 9 among 'images'; add it, or remove the annotation",
        ),
        (
            lambda d: first(d, "images", file_name="x.png"),
            "/instances.json: image 1: there is no file '/x.png'; name their folder with 'images', or remove the image "
            "from the annotations",
        ),
        (
            lambda d: first(d, "images", width=41),
            "/instances.json: image 1: 'a.png' is 40 x 30 pixels, and here it is 41 x 30; its boxes would not fit: "
            "correct the one or the other",
        ),
        (
            lambda d: d.pop("categories"),
            "/instances.json: has no list of 'categories', so it is no COCO annotation file of objects",
        ),
        (lambda d: d["images"][1].pop("width"), "/instances.json: images[1] (id 2) has no 'width'"),
        (
            lambda d: first(d, "annotations", iscrowd="0"),
            "/instances.json: annotation 100: iscrowd '0' is neither 0 nor 1",
        ),
        (
            lambda d: d["images"][1].update(file_name="a.png"),
            "/instances.json: images 1 and 2 are one file, 'a.png'; keep one, with all annotations",
        ),
    ],
)
def test_a_bad_coco_file_is_named_with_its_annotation(change, message, tmp_path):
    assert bad_coco(tmp_path, change) == message


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1\n",
            "a.txt:2: class 2 is not among the 2 names, which count from 0; add it there",
        ),
        (
            "0 0.99 0.5 0.2 0.2\n",
            "a.txt:1: the box '0 0.99 0.5 0.2 0.2' spans x 35.6 to 43.6 and y 12 to 18, outside its image of 40 x 30 "
            "pixels; clip it, or look for the image that it belongs to",
        ),
        (
            "0 0.5 0.5 0.1\n",
            "a.txt:1: '0 0.5 0.5 0.1' has 3 numbers after its class, and a box has 4: x, y, width, height as shares of "
            "the image",
        ),
        ("three 0.5 0.5 0.1 0.1\n", "a.txt:1: 'three 0.5 0.5 0.1 0.1' is not 'class x y width height' in numbers"),
        ("0 nan 0.5 0.1 0.1\n", "a.txt:1: the box '0 nan 0.5 0.1 0.1' has no finite, positive size"),
    ],
)
def test_a_bad_yolo_line_is_named(lines, message, tmp_path):
    with pytest.raises(UserError) as error:
        read("coco", path=str(yolo_in(tmp_path, lines)))
    assert str(error.value) == f"{tmp_path}/labels/train/{message}"


def test_files_that_are_not_there_or_broken_are_named(tmp_path):
    file = coco_in(tmp_path)
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"instances.json:\d+: not JSON: "):
        read("coco", path=str(file))
    file.write_text(whole)
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a.png: not a readable image: .*; copy it again"):
        read("coco", path=str(file))
    with pytest.raises(UserError, match=r"path: there is no 'nowhere\.json'"):
        read("coco", path="nowhere.json")
    with pytest.raises(UserError, match=r"has no data.yaml; name a folder that has one"):
        read("coco", path=str(tmp_path))
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a\n")
    with pytest.raises(UserError, match=r"data.yaml:\d+: not YAML"):
        read("coco", path=str(tmp_path))
    (tmp_path / "data.yaml").write_text("train: nowhere\nnames: [a]\n")
    with pytest.raises(UserError, match=r"data.yaml: train: there is no folder .*nowhere'; correct it, or set 'path'"):
        read("coco", path=str(tmp_path))


@pytest.mark.parametrize("names", ["three", "5", "{1: three, 2: seven}", "{0: three, x: seven}"])
def test_names_of_classes_are_a_list_or_count_from_0(names, tmp_path):
    file = yolo_in(tmp_path) / "data.yaml"
    file.write_text(f"train: images/train\nnames: {names}\n")
    with pytest.raises(UserError, match=r"data.yaml: names: .* is no list, and no mapping of 0 to the last class"):
        read("coco", path=str(tmp_path))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("names: [yes, no]", "names: YAML reads one of them as True; write it in quotes"),
        ("names: [three, null]", "names: YAML reads one of them as None; write it in quotes"),
        ("names: [three, seven]\nnc: 3", "nc is 3, and names tells of 2 classes; correct one of them"),
    ],
)
def test_names_that_are_not_what_they_look_like_are_refused(about, message, tmp_path):
    (yolo_in(tmp_path) / "data.yaml").write_text(f"train: images/train\n{about}\n")
    with pytest.raises(UserError, match=message):
        read("coco", path=str(tmp_path))


def test_images_without_one_text_file_are_no_data_set(tmp_path):
    (yolo_in(tmp_path) / "labels" / "train" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"train: no image has a text file with its boxes; .*a.txt'"):
        read("coco", path=str(tmp_path))


def test_an_image_that_viewers_turn_is_refused(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    with pytest.raises(UserError, match=r"turned.jpg: is to be turned when it is shown \(EXIF orientation 6\)"):
        facts(path)


def test_ids_are_whole_numbers_and_each_its_own(tmp_path):
    file = coco_in(tmp_path)
    data = json.loads(file.read_text())
    for change, message in (
        ({"categories": [{**data["categories"][0], "id": "2"}]}, r"categories\[0\] .*: id '2' is no whole number"),
        ({"images": [data["images"][0]] * 2}, r"images\[1\] .*: another of the images has that id"),
    ):
        file.write_text(json.dumps({**data, **change}))
        with pytest.raises(UserError, match=message):
            read("coco", path=str(file))


def test_labels_lie_where_yolo_looks_for_them():
    assert label_file(Path("/x/images/y/images/train/a.b.jpg")) == Path("/x/images/y/labels/train/a.b.txt")
    assert label_file(Path("/x/a.jpg")) == Path("/x/a.txt")


@given(st.tuples(*[st.floats(-20, 60, allow_nan=False)] * 4))
def test_a_box_is_clipped_refused_or_left_out(box):
    try:
        clipped = within(box, 40, 30, "it")
    except UserError:
        x0, y0, x1, y1 = box
        assert x1 < x0 or y1 < y0 or min(x0, y0) < -1 or x1 > 41 or y1 > 31
    else:
        if clipped is not None:
            assert np.abs(np.subtract(clipped, box)).max() <= 1
            assert 0 <= clipped[0] < clipped[2] <= 40
            assert 0 <= clipped[1] < clipped[3] <= 30


def test_yolo_folders_without_what_systems_leave_and_with_their_links(tmp_path):
    root = yolo_in(tmp_path / "d", parts=("train", "val"))
    images_in(tmp_path / "elsewhere")
    (root / "images" / "train" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "images" / "train" / "gone.png").symlink_to(tmp_path / "none.png")
    eadir = root / "images" / "val" / "@eaDir"
    eadir.mkdir()
    (eadir / "a.png").write_bytes(b"a thumbnail")
    split = read("coco", path=str(root))
    assert (len(split.train), len(split.held_out)) == (6, 3)
    assert (split.counts["broken_links"], split.counts["system_files"]) == (1, 1)


def test_deep_images_with_boxes_go_through_a_window(tmp_path):
    root = yolo_in(tmp_path)
    deep = np.random.default_rng(0).integers(0, 4096, (30, 40)).astype(np.uint16)
    Image.fromarray(deep).save(root / "images" / "train" / "a.png")
    split = read("coco", path=str(root), window=(0, 4095))
    image = next(e.image for e in (*split.train, *split.held_out) if e.name.endswith("a.png"))
    assert np.array_equal(image[..., 0], np.floor(deep / 4095 * 255 + 0.5).astype(np.uint8))
    with pytest.raises(UserError, match="its first number is to be below its second"):
        read("coco", path=str(root), window=(9, 9))
