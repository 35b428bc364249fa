"""Image data sets: what they hold, that their parts share nothing, and what they say of bad input."""

import gzip
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmq import cli, plugin
from llmq.data import photographs
from llmq.errors import UserError
from llmq.vision.images import read_image


def read(word: str, **settings: Any) -> Any:
    """The split of a data word."""
    data: Any = plugin.build({word: settings}, "data")
    data.check()
    return data.read()


def save(path: Path, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> Path:
    """A file with a random image `size` wide and high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    Image.fromarray(values).save(path)
    return path


def idx(path: Path, values: np.ndarray) -> Path:
    """An array as one of MNIST's files."""
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    data = head + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def clothes(folder: Path, train: int = 6, test: int = 4, suffix: str = ".gz") -> Path:
    """The four files with few random images."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("t10k", test)):
        idx(folder / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (n, 28, 28)))
        idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)
    return folder


def classes_in(folder: Path, names: str = "ab", n: int = 10) -> Path:
    """A folder of class folders with random images."""
    for k, name in enumerate(names):
        for i in range(n):
            save(folder / name / f"{i}.png", 1000 * k + i)
    return folder


def test_digits_are_all_there_once_and_each_class_is_held_out_alike():
    split = read("digits")
    assert dict(split.counts) == {"read": 1797, "train": 1438, "held_out": 359}
    assert split.classes == tuple("0123456789")
    held_out = np.bincount([example.label for example in split.held_out])
    everything = held_out + np.bincount([example.label for example in split.train])
    assert np.all(abs(held_out - 0.2 * everything) <= 0.5)
    names = [example.name for example in (*split.train, *split.held_out)]
    assert len(set(names)) == len(names) == 1797
    image = split.train[0].image
    assert (image.shape, image.dtype) == ((8, 8, 1), np.uint8)
    assert max(example.image.max() for example in split.train) == 255


def test_digits_are_scikit_learns_and_their_split_follows_the_seed():
    from sklearn.datasets import load_digits

    found, split = load_digits(), read("digits", seed=3)
    for example in split.held_out[:20]:
        number = int(example.name.split()[1])
        assert example.label == found.target[number]
        assert np.array_equal(np.round(example.image[..., 0] / 255 * 16), found.images[number])
    assert split.sha256 == read("digits", seed=3).sha256 != read("digits").sha256
    assert [e.name for e in split.held_out] != [e.name for e in read("digits").held_out]


def test_photographs_share_no_pixel_between_the_parts():
    split = read("photographs", train=48, held_out=24)
    sizes = {p.stem: read_image(p).shape for p in photographs._files()}
    borders = {
        p.stem: (axis, sizes[p.stem][axis] // 2)
        for p, (*_, axis) in zip(photographs._files(), photographs.CARRIED, strict=True)
    }
    images = {p.stem: read_image(p) for p in photographs._files()}
    for side, examples in ((0, split.train), (1, split.held_out)):
        for example in examples:
            name, corner, length = example.name.split()
            left, top = map(int, corner.split(","))
            axis, border = borders[name]
            part = np.split(images[name], [border], axis=axis)[side]
            assert np.array_equal(part[top : top + int(length), left : left + int(length)], example.image)
            assert example.image.shape[0] == example.image.shape[1] == int(length) >= 192
    assert {example.name.split()[0] for example in split.held_out} == set(sizes)
    assert split.shape == "image"


def test_photographs_are_the_same_under_the_same_seed_only():
    assert read("photographs", seed=1).sha256 == read("photographs", seed=1).sha256 != read("photographs").sha256
    names = [[e.name for e in read("photographs", seed=s).train] for s in (0, 1)]
    assert names[0] != names[1]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_is_read_from_its_four_files(tmp_path, suffix):
    split = read("fashion_mnist", path=str(clothes(tmp_path, suffix=suffix)))
    assert (len(split.train), len(split.held_out), split.shape) == (6, 4, "image/label")
    assert split.classes[9] == "ankle boot"
    example = split.held_out[3]
    assert (example.image.shape, example.label) == ((28, 28, 1), 3)
    again = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    assert np.array_equal(split.train[2].image[..., 0], again[2])
    assert len(read("fashion_mnist", path=str(tmp_path), limit=2).train) == 2


def test_class_folders_are_split_by_hash_alike_in_each_class(tmp_path):
    split = read("image_folder", path=str(classes_in(tmp_path, "cab")), held_out=0.3)
    assert split.classes == ("a", "b", "c")
    assert np.bincount([example.label for example in split.held_out]).tolist() == [3, 3, 3]
    assert not {example.name for example in split.train} & {example.name for example in split.held_out}
    assert all(example.name[0] == "abc"[example.label] for example in split.train)
    assert [e.name for e in read("image_folder", path=str(tmp_path), held_out=0.3).held_out] == [
        e.name for e in split.held_out
    ]


def test_adding_an_image_moves_at_most_one_other(tmp_path):
    before = {e.name for e in read("image_folder", path=str(classes_in(tmp_path, "a", 30)), held_out=0.5).held_out}
    save(tmp_path / "a" / "new.png", 77)
    after = {e.name for e in read("image_folder", path=str(tmp_path), held_out=0.5).held_out}
    assert len(before ^ after) <= 2


def test_train_and_val_folders_are_kept_apart(tmp_path):
    classes_in(tmp_path / "train", "ab", 4)
    save(tmp_path / "val" / "b" / "x.jpg", 5)
    split = read("image_folder", path=str(tmp_path))
    assert (len(split.train), len(split.held_out)) == (8, 1)
    assert (split.held_out[0].label, split.held_out[0].name) == (1, "val/b/x.jpg")


def test_images_without_folders_have_no_labels_and_folders_can_be_ignored(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", i)
    assert read("image_folder", path=str(tmp_path)).shape == "image"
    save(tmp_path / "more" / "x.png", 9)
    split = read("image_folder", path=str(tmp_path), labels=False)
    assert (split.shape, split.counts["read"], split.train[0].label) == ("image", 6, None)


def test_a_file_that_stands_twice_is_used_once_and_others_are_counted(tmp_path):
    classes_in(tmp_path, "ab", 5)
    (tmp_path / "a" / "again.png").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    with Image.open(tmp_path / "a" / "1.png") as same:
        same.save(tmp_path / "a" / "same.bmp")  # the same pixels in another file
    (tmp_path / "a" / "notes.txt").write_text("none")
    counts = read("image_folder", path=str(tmp_path)).counts
    assert (counts["duplicates"], counts["no_image"], counts["train"] + counts["held_out"]) == (2, 1, 10)


def test_grey_and_colour_are_read_as_asked(tmp_path):
    save(tmp_path / "a.png", mode="L")
    save(tmp_path / "b.png", 1)
    for channels in (1, 3):
        split = read("image_folder", path=str(tmp_path), channels=channels)
        assert {e.image.shape for e in (*split.train, *split.held_out)} == {(10, 12, channels)}


@dataclass(frozen=True)
class Bad:
    """A file or folder made by `make`, the data that names it, and what the one line must say."""

    name: str
    make: Callable[[Path], Any]
    data: str
    says: tuple[str, ...]


def cut_short(path: Path) -> None:
    """A PNG without its end."""
    save(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:3000])


def deep_colour(path: Path) -> None:
    """A PNG of one pixel with 16 bits a channel, which Pillow opens as 8."""
    path.parent.mkdir(parents=True)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b""))


def unlike_labels(folder: Path) -> None:
    """One label too few."""
    idx(clothes(folder, suffix="") / "t10k-labels-idx1-ubyte", np.arange(3))


SHORT = b"\0\0\x08\x01\0\0\0\x09a"  # nine bytes promised, one there
FOLDER = "{image_folder: {path: d}}"
CLOTHES = "{fashion_mnist: {path: d}}"
CASES = [
    Bad("no-folder", lambda d: None, FOLDER, ("there is no folder 'd'",)),
    Bad("empty-folder", lambda d: d.mkdir(), FOLDER, ("'d' has no image", ".jpg")),
    Bad("no-image-in-it", lambda d: (d.mkdir(), (d / "x.txt").write_text("x")), FOLDER, ("'d' has no image",)),
    Bad("not-an-image", lambda d: (save(d / "a" / "y.png"), (d / "a" / "x.png").write_text("text")), FOLDER,
        ("d/a/x.png", "not a readable image")),
    Bad("cut-short", lambda d: cut_short(d / "a" / "x.png"), FOLDER, ("d/a/x.png", "not a readable image")),
    Bad("16-bit", lambda d: save(d / "a" / "x.png", mode="I;16"), FOLDER,
        ("d/a/x.png", "more than 8 bits", "scale it")),
    Bad("16-bit-colour", lambda d: deep_colour(d / "a" / "x.png"), FOLDER,
        ("d/a/x.png", "RGB;16B holds more than 8 bits", "scale it")),
    Bad("empty-class", lambda d: (save(d / "a" / "x.png"), (d / "b").mkdir()), FOLDER, ("d/b", "has no image")),
    Bad("loose-image", lambda d: (save(d / "a" / "x.png"), save(d / "y.png")), FOLDER,
        ("d/y.png", "beside class folders", "labels: false")),
    Bad("unknown-class", lambda d: (save(d / "train" / "cat" / "x.png"), save(d / "val" / "cats" / "y.png")), FOLDER,
        ("d/val/cats", "class 'cats' is not in 'train'", "did you mean 'cat'?")),
    Bad("no-class-folders", lambda d: save(d / "x.png"), "{image_folder: {path: d, labels: true}}",
        ("'d'", "no class folders", "labels: false")),
    Bad("other-classes", lambda d: classes_in(d, "abc", 3), FOLDER,
        ("the data has 3 classes, and this network has 2", "model.classes=3")),
    Bad("two-channels", lambda d: None, "{image_folder: {path: d, channels: 2}}", ("channels: 2", "1 or 3")),
    Bad("no-idx-file", lambda d: d.mkdir(), CLOTHES, ("'d' has neither train-images-idx3-ubyte",)),
    Bad("not-packed", lambda d: (clothes(d) / "train-images-idx3-ubyte.gz").write_bytes(b"no"), CLOTHES,
        ("train-images-idx3-ubyte.gz", "cannot be unpacked")),
    Bad("no-idx", lambda d: (clothes(d, suffix="") / "t10k-labels-idx1-ubyte").write_bytes(b"no idx"), CLOTHES,
        ("t10k-labels-idx1-ubyte", "no idx file", "b'no i'")),
    Bad("idx-cut-short", lambda d: (clothes(d, suffix="") / "t10k-labels-idx1-ubyte").write_bytes(SHORT), CLOTHES,
        ("t10k-labels-idx1-ubyte", "promises 9 bytes, and 1 follow")),
    Bad("unlike-labels", unlike_labels, CLOTHES, ("t10k-labels-idx1-ubyte", "3 labels", "4 images")),
    Bad("unknown-label", lambda d: idx(clothes(d, suffix="") / "t10k-labels-idx1-ubyte", np.array([0, 1, 2, 10])),
        CLOTHES, ("t10k-labels-idx1-ubyte", "label 10 is unknown", "10 classes")),
]  # fmt: skip
RECIPE = """model:
  timm_classifier: {architecture: test_resnet, classes: 2, input_size: 32}
steps:
- adapt.train:
    data: %s
"""


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_images_are_refused_in_one_line(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad.make(Path("d"))
    Path("r.yaml").write_text(RECIPE % bad.data)
    monkeypatch.setattr(sys, "argv", ["llmq", "run", "r.yaml", "--out", "o"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert not out
    line = [line for line in err.splitlines() if line.strip() and line != "bringing the base"]
    assert len(line) == 1, err
    for part in bad.says:
        assert part in line[0]
    assert not Path("o").exists()


def test_a_package_without_its_photograph_is_named(monkeypatch):
    monkeypatch.setattr(photographs, "CARRIED", (("no_such_package", "a/b.jpg", 0),))
    with pytest.raises(UserError, match=r"a/b\.jpg is carried by no_such_package, .* use data\.image_folder"):
        read("photographs", train=5)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (30, 30)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match=r"huge.png: not a readable image: Image size \(900 pixels\) exceeds limit"):
        read_image(tmp_path / "huge.png")
