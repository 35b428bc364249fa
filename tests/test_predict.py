"""`llmq predict`: every kind of model, every kind of file; what is bad is named, and nothing is half written."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from generators import GAN
from helpers import CPU, apply, base_of, exit_code
from PIL import Image

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.predicting import Predictions, predict
from llmq.predictors import Predictor
from llmq.types import Loaded
from llmq.vision.degrade import to_uint8
from llmq.vision.foreign.kinds import ForeignClassifier, ForeignDetector, ForeignSuperResolution
from llmq.vision.rasters import voxel_size
from llmq.vision.upscaling import Upscaling

pytestmark = pytest.mark.usefixtures("one_thread")
EDSR = {"edsr": {"n_resblocks": 1, "n_feats": 8, "scale": 2}}
CLASSIFIER = {"timm_classifier": {"architecture": "test_resnet", "classes": 7, "input_size": 32}}
DETECTOR = {"torchvision_detector": {"size": 64, "classes": 3}}


def base(model: Any) -> Artifact[Any]:
    built: Any = plugin.build(model, "models")
    return built.base(CPU)


def predicted(model: Any, files: list[Path], out: Path, skip_bad: bool = False, **options: Any) -> Predictions:
    return predict(model if isinstance(model, Artifact) else base(model), files, out, options, CPU, skip_bad)


def noise(*shape: int, kind: str = "uint8", seed: int = 0) -> np.ndarray:
    most = 2**16 if kind == "uint16" else 256
    return np.random.default_rng(seed).integers(0, most, shape).astype(kind)


def saved(path: Path, *shape: int, kind: str = "uint8", seed: int = 0) -> Path:
    """A file of noise in the format of its suffix."""
    pixels = noise(*shape, kind=kind, seed=seed)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, photometric="minisblack")
    elif path.suffix == ".npy":
        np.save(path, pixels)
    elif path.suffix == ".npz":
        np.savez_compressed(path, hr=pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def llmq(capsys):
    """Runs a command line; the exit code, the standard output and the errors."""

    def run(*words: object) -> tuple[int, str, str]:
        code = exit_code(*words)
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return run


@pytest.mark.parametrize("word", [w for w in plugin.words() if w.startswith("models.")])
def test_every_family_says_how_it_predicts(word):
    model: Any = plugin.load(word).model_construct()
    kinds = (
        (ForeignClassifier, ForeignDetector, ForeignSuperResolution) if word == "models.exported" else (type(model),)
    )
    for kind in kinds:
        predictor = kind.model_construct().predictor()
        assert issubclass(predictor, Predictor)
        assert predictor is not Predictor


def test_a_picture_is_what_the_network_makes_of_it_whole(tmp_path):
    edsr = base(EDSR)
    file = saved(tmp_path / "a.png", 37, 50)
    made = predicted(edsr, [file], tmp_path / "out")
    assert (made.rows, made.inputs, dict(made.skipped)) == (1, 1, {})
    assert made.files == (tmp_path / "out" / "a.png",)
    with edsr.open("cpu") as loaded:
        expected = to_uint8(edsr.model.upscale(loaded, noise(37, 50)[..., None]))
    np.testing.assert_array_equal(np.asarray(Image.open(made.files[0])), expected[..., 0])


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_tiles_make_what_the_whole_makes(kind, tmp_path):
    file = saved(tmp_path / "a.tif", 3, 37, 50, kind=kind)
    whole = predicted(EDSR, [file], tmp_path / "whole")
    tiled = predicted({"edsr": {**EDSR["edsr"], "tile": 16}}, [file], tmp_path / "tiled")
    ours, theirs = (tifffile.imread(made.files[0]).astype(np.float64) for made in (whole, tiled))
    assert ours.shape == (3, 74, 100)
    assert np.abs(ours - theirs).max() <= (1 if kind != "float32" else 1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "larger"),
    [
        ("a.png", (12, 10), "uint8", (24, 20)),
        ("a.png", (12, 10, 3), "uint8", (24, 20, 3)),
        ("a.png", (12, 10), "uint16", (24, 20)),
        ("a.tif", (12, 10), "uint16", (24, 20)),
        ("a.tif", (3, 12, 10), "uint8", (3, 24, 20)),
        ("a.tif", (3, 12, 10), "uint16", (3, 24, 20)),
        ("a.tif", (3, 12, 10), "int16", (3, 24, 20)),
        ("a.npy", (3, 12, 10), "uint16", (3, 24, 20)),
        ("a.npy", (12, 10), "uint8", (24, 20)),
        ("a.npz", (3, 12, 10), "uint8", (3, 24, 20)),
        ("a.npz", (3, 12, 10), "float32", (3, 24, 20)),
    ],
)
def test_a_file_keeps_its_format_and_the_kind_of_its_numbers(name, shape, kind, larger, tmp_path):
    made = predicted(EDSR, [saved(tmp_path / name, *shape, kind=kind)], tmp_path / "out")
    (file,) = made.files
    assert file.name == name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [name]
    read = {".png": lambda f: np.asarray(Image.open(f)), ".tif": tifffile.imread, ".npy": np.load}
    pixels = np.load(file)["hr"] if file.suffix == ".npz" else read[file.suffix](file)
    assert (pixels.shape, pixels.dtype) == (larger, kind)
    assert made.rows == (3 if len(shape) == 3 and shape[-1] != 3 else 1)


def smooth(kind: str) -> np.ndarray:
    """A ramp: the random network's skip gives it back roughly, and bicubic closely."""
    return np.linspace(20_000, 40_000, 24 * 24).reshape(24, 24).astype(kind)


def test_sixteen_bits_go_through_the_window_and_back(tmp_path):
    srcnn = {"srcnn": {"scale": 2}}
    tifffile.imwrite(tmp_path / "a.tif", smooth("uint16"))
    tifffile.imwrite(tmp_path / "b.tif", ((smooth("float64") - 20_000) / 20_000 * 255).astype("float32"))
    deep = tifffile.imread(predicted(srcnn, [tmp_path / "a.tif"], tmp_path / "1", window=(20_000, 40_000)).files[0])
    grey = tifffile.imread(predicted(srcnn, [tmp_path / "b.tif"], tmp_path / "2", window=(0, 255)).files[0])
    np.testing.assert_allclose((deep.astype(float) - 20_000) / 20_000 * 255, grey, atol=0.02)
    assert len(np.unique(deep)) > 256, "no detour by bytes"


def test_a_window_of_deep_files_leaves_bytes_alone_and_what_lies_beyond_is_said(tmp_path, capsys):
    file = saved(tmp_path / "a.png", 12, 10)
    plain = predicted(EDSR, [file], tmp_path / "1").files[0].read_bytes()
    assert predicted(EDSR, [file], tmp_path / "2", window=(1000, 2000)).files[0].read_bytes() == plain
    predicted(EDSR, [saved(tmp_path / "b.png", 12, 10, kind="uint16")], tmp_path / "3", window=(0, 32768))
    assert "lie beyond the window 0 to 32768: cut to it" in capsys.readouterr().err
    predicted(EDSR, [tmp_path / "b.png"], tmp_path / "4")
    assert "b.png: uint16 without a window" in " ".join(capsys.readouterr().err.split())


def test_transparency_that_is_lost_is_said(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", noise(12, 10, 4), photometric="rgb", extrasamples=["unassalpha"])
    Image.fromarray(noise(12, 10, 3)).convert("P").save(tmp_path / "b.png", transparency=3)
    saved(tmp_path / "c.png", 12, 10, 4)
    saved(tmp_path / "d.png", 12, 10, 3)
    predicted(EDSR, sorted(tmp_path.iterdir()), tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert [name for name in ("a.tif", "b.png", "c.png", "d.png") if f"{name}: its transparency" in said] == [
        "a.tif",
        "b.png",
        "c.png",
    ]


def test_the_window_of_the_run_counts(tmp_path):
    stage = tmp_path / "run" / "1-train"
    artifact = base(EDSR)
    stage.mkdir(parents=True)
    (stage / "model.safetensors").write_bytes((artifact.weights / "model.safetensors").read_bytes())
    Artifact(artifact.model, stage).save(stage)
    recipe = "model: edsr\nsteps:\n- adapt.train:\n    data:\n      rock: {path: gone.tif, window: [0, 1000]}\n"
    (stage.parent / "recipe.yaml").write_text(recipe)
    file = saved(tmp_path / "b.png", 12, 10, kind="uint16")
    ours = predicted(Artifact.load(stage), [file], tmp_path / "1").files[0].read_bytes()
    assert ours == predicted(artifact, [file], tmp_path / "2", window=(0, 1000)).files[0].read_bytes()


def test_colours_go_one_by_one_through_a_grey_network(tmp_path):
    file = saved(tmp_path / "a.png", 12, 10, 3)
    made = np.asarray(Image.open(predicted(EDSR, [file], tmp_path / "out").files[0]))
    for colour in range(3):
        Image.fromarray(noise(12, 10, 3)[..., colour]).save(tmp_path / f"{colour}.png")
        alone = predicted(EDSR, [tmp_path / f"{colour}.png"], tmp_path / f"out{colour}")
        np.testing.assert_array_equal(made[..., colour], np.asarray(Image.open(alone.files[0])))


def test_voxels_shrink_with_their_pixels(tmp_path):
    about = {"resolution": (10.0, 20.0), "resolutionunit": 3}
    metadata = {"spacing": 2.5, "unit": "um", "axes": "ZYX"}
    tifffile.imwrite(tmp_path / "a.tif", noise(3, 8, 8), imagej=True, metadata=metadata, **about)
    made = predicted(EDSR, [tmp_path / "a.tif"], tmp_path / "out")
    with tifffile.TiffFile(made.files[0]) as file:
        tags = file.pages[0].tags
        assert [tags[t].value[0] / tags[t].value[1] for t in (282, 283)] == [20.0, 40.0]
        assert tags[296].value == 3
        assert (file.imagej_metadata["spacing"], file.imagej_metadata["unit"]) == (2.5, "um")
        assert file.series[0].shape == (3, 16, 16)


@pytest.mark.parametrize(("kind", "unit", "micrometres"), [("uint16", "µm", 1), ("int16", "mm", 1000)])
def test_voxels_that_ome_tells_are_kept(kind, unit, micrometres, tmp_path, capsys):
    about = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0}
    about |= {f"PhysicalSize{axis}Unit": unit for axis in "XYZ"}
    tifffile.imwrite(tmp_path / "a.ome.tif", noise(3, 8, 8, kind=kind), metadata=about)
    assert voxel_size(tmp_path / "a.ome.tif") is None  # a width and another height
    made = predicted(EDSR, [tmp_path / "a.ome.tif"], tmp_path / "out")
    assert "OME" not in capsys.readouterr().err
    with tifffile.TiffFile(made.files[0]) as file:
        tags = file.pages[0].tags
        per = [tags[t].value[0] / tags[t].value[1] for t in (282, 283)]
        if kind == "uint16":
            assert per == pytest.approx([4.0, 8.0])
            assert (file.imagej_metadata["spacing"], file.imagej_metadata["unit"]) == (2.0, "um")
        else:
            assert per == pytest.approx([1e4 / micrometres * 4, 1e4 / micrometres * 8])
            assert tags[296].value == 3
            (sizes,) = re.findall(r"<Pixels .*?>", file.ome_metadata)
            found = {axis: float(re.search(f'PhysicalSize{axis}="(.*?)"', sizes)[1]) for axis in "XYZ"}
            assert found == {"X": 250, "Y": 125, "Z": 2000}  # micrometres
    about |= {"PhysicalSizeXUnit": "pixel"}
    tifffile.imwrite(tmp_path / "b.ome.tif", noise(3, 8, 8, kind=kind), metadata=about)
    predicted(EDSR, [tmp_path / "b.ome.tif"], tmp_path / "out2")
    assert "in its description of OME is not understood" in " ".join(capsys.readouterr().err.split())


def test_pictures_beside(tmp_path):
    made = predicted(EDSR, [saved(tmp_path / "a.tif", 3, 12, 10)], tmp_path / "out", beside=True)
    names = ["a.tif", "a.tif.bicubic.png", "a.tif.difference.png", "a.tif.model.png"]
    assert [file.name for file in made.files] == names
    stack, simple, difference, ours = (np.asarray(Image.open(f)).astype(int) for f in made.files)
    middle = tifffile.imread(made.files[0])[1].astype(int)
    np.testing.assert_array_equal(ours, middle)
    inside = np.abs(ours - simple) < 127
    assert np.abs(difference - 128 - (ours - simple))[inside].max() <= 1
    assert stack.shape == (24, 20)


def test_folders_are_walked_and_keep_their_shape(tmp_path, capsys, monkeypatch):
    for name in ("x/a.png", "x/y/a.png", "x/.hidden.png", "x/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("png"):
            saved(tmp_path / name, 8, 8)
        else:
            (tmp_path / name).write_text("no picture")
    made = predicted(EDSR, [tmp_path / "x"], tmp_path / "out")
    assert [str(f.relative_to(tmp_path / "out")) for f in made.files] == ["a.png", "y/a.png"]
    assert "passed over in the folders: 1 other files, 1 system files" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"would both become 'a.png'; take two --out"):
        predicted(EDSR, [tmp_path / "x", tmp_path / "x" / "y" / "a.png"], tmp_path / "out2")
    saved(tmp_path / "x" / "a.bmp", 8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(Upscaling, "_enlarge", lambda *given: pytest.fail("enlarged before the names were looked at"))
        with pytest.raises(UserError, match=r"a\.bmp' and .*a\.png' would both become 'a\.png'"):
            predicted(EDSR, [tmp_path / "x" / "a.png", tmp_path / "x" / "a.bmp"], tmp_path / "out3")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("bad.png", b"\x89PNG\r\n\x1a\nrubbish", "not a readable image"),
        ("bad.tif", b"II*\0rubbish", "not a readable image"),
        ("bad.npz", b"PK rubbish", r"not a readable \.npz of arrays"),
        ("bad.npy", b"\x93NUMPY", r"not a readable \.npy of arrays"),
    ],
)
def test_a_bad_file_ends_it_before_anything_is_written_or_is_skipped(name, data, said, tmp_path):
    good, bad = saved(tmp_path / "a.png", 8, 8), tmp_path / name
    bad.write_bytes(data)
    with pytest.raises(UserError, match=said):
        predicted(EDSR, [good, bad], tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", name}
    made = predicted(EDSR, [bad, good], tmp_path / "out", skip_bad=True)
    assert [f.name for f in made.files] == ["a.png"]
    assert list(made.skipped) == [str(bad)]
    with pytest.raises(UserError, match=f"all 1 files are bad; the first: .*{said}"):
        predicted(EDSR, [bad], tmp_path / "out2", skip_bad=True)


def test_odd_volumes_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=noise(2, 8, 8), b=noise(2, 8, 8))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "four.npy", noise(2, 2, 8, 8))
    np.save(tmp_path / "nan.npy", np.full((2, 8, 8), np.nan, np.float32))
    np.save(tmp_path / "flags.npy", np.ones((8, 8), bool))
    np.save(tmp_path / "thin.npy", noise(3, 8, 1))
    said = {
        "two.npz": "holds a, b; call the one to enlarge 'lr'",
        "text.npy": r"is <U1\(1,\); a volume",
        "four.npy": r"is uint8\(2, 2, 8, 8\); a volume",
        "nan.npy": "not finite; fill them first",
        "flags.npy": "holds bool numbers",
        "thin.npy": "8 x 1 pixels; 2 a side are needed",
        "scan.raw": r"a \.raw is not enlarged into another; save the volume as \.npy",
    }
    (tmp_path / "scan.raw").write_bytes(bytes(64))
    for name, words in said.items():
        with pytest.raises(UserError, match=words):
            predicted(EDSR, [tmp_path / name], tmp_path / "out")


def test_a_volume_of_pairs_gives_its_low_half(tmp_path):
    np.savez(tmp_path / "pairs.npz", hr=noise(2, 16, 16), lr=noise(2, 8, 8))
    made = predicted(EDSR, [tmp_path / "pairs.npz"], tmp_path / "out")
    assert {name: array.shape for name, array in np.load(made.files[0]).items()} == {"lr": (2, 16, 16)}


@pytest.mark.parametrize("name", ["a.npz", "a.tif", "a.png"])
def test_the_same_file_gives_the_same_bytes(name, tmp_path):
    file = saved(tmp_path / name, *((2, 8, 8) if name != "a.png" else (8, 8)))
    made = [predicted(EDSR, [file], tmp_path / str(i)).files[0].read_bytes() for i in range(2)]
    assert made[0] == made[1]


def test_classes_as_a_table(tmp_path):
    files = [saved(tmp_path / f"{i}.png", 40, 30, 3, seed=i) for i in range(2)]
    Image.fromarray(noise(20, 20)).save(tmp_path / "grey.jpg")
    artifact = base(CLASSIFIER)
    made = predicted(artifact, [*files, tmp_path / "grey.jpg"], tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [row["file"] for row in rows] == ["0.png", "1.png", "grey.jpg"]
    assert made.rows == 3
    with artifact.open("cpu") as loaded:
        shares = artifact.model.logits(loaded, [noise(40, 30, 3, seed=1)])[0].double().softmax(0)
    assert rows[1]["class"] == str(int(shares.argmax()))
    assert float(rows[1]["probability"]) == pytest.approx(float(shares.max()), abs=1e-6)
    listed = [float(rows[1][f"probability{n}"]) for n in ("", *range(2, 6))]
    assert listed == sorted(listed, reverse=True)
    assert list(rows[0])[-2:] == ["class5", "probability5"]


def test_classes_have_the_names_that_the_run_learned(tmp_path):
    artifact = base({"timm_classifier": {**CLASSIFIER["timm_classifier"], "classes": 10}})
    stage = tmp_path / "run" / "1-train"
    stage.mkdir(parents=True)
    (stage / "model.safetensors").write_bytes((artifact.weights / "model.safetensors").read_bytes())
    Artifact(artifact.model, stage).save(stage)
    plain = {
        "model": {"timm_classifier": {"architecture": "test_resnet", "classes": 10}},
        "steps": [{"adapt.train": {"data": "digits"}}],
        "evaluate": ["size"],
    }
    (stage.parent / "recipe.yaml").write_text(json.dumps(plain))
    predicted(Artifact.load(stage), [saved(tmp_path / "a.png", 40, 30, 3)], tmp_path / "out")
    (row,) = csv.DictReader((tmp_path / "out" / "predictions.csv").open())
    names = plugin.build("data.digits").read().classes  # type: ignore[attr-defined]
    assert row["class"] in names


def test_detections_in_cocos_shape(tmp_path):
    artifact = base(DETECTOR)
    files = [saved(tmp_path / "a.png", 40, 60, 3), saved(tmp_path / "b.jpg", 50, 50, 3)]
    made = predicted(artifact, files, tmp_path / "out", threshold=0.005)
    assert [f.name for f in made.files] == ["a.png", "b.jpg.png", "detections.json"]
    told = json.loads(made.files[-1].read_text())
    assert told["images"][0] == {"id": 1, "file_name": "a.png", "width": 60, "height": 40}
    model = artifact.model.model_copy(update={"score_threshold": 0.005})
    with artifact.open("cpu") as loaded:
        (expected,) = model.detect(loaded, [noise(40, 60, 3)])
    found = [each for each in told["annotations"] if each["image_id"] == 1]
    assert len(found) == len(expected.boxes) > 0
    x0, y0, x1, y1 = expected.boxes[0]
    assert found[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
    assert found[0]["score"] == pytest.approx(expected.scores[0], abs=1e-6)
    assert {each["category_id"] for each in told["annotations"]} <= {c["id"] for c in told["categories"]}
    assert Image.open(made.files[0]).size == (60, 40)
    from pycocotools.coco import COCO

    assert len(COCO(made.files[-1]).getAnnIds()) == len(told["annotations"])


def test_no_picture_is_written_over_another(tmp_path, monkeypatch):
    monkeypatch.setattr(Artifact, "open", lambda *given: pytest.fail("opened before the names were looked at"))
    one, other = saved(tmp_path / "a.jpg", 32, 32), saved(tmp_path / "a.jpg.png", 32, 32)
    with pytest.raises(UserError, match=r"a\.jpg\.png' and .*a\.jpg' would both become 'a\.jpg\.png'; take two --out"):
        predicted(DETECTOR, [one, other], tmp_path / "out")
    whole, beside = saved(tmp_path / "a.png", 32, 32), saved(tmp_path / "a.png.model.png", 32, 32)
    with pytest.raises(UserError, match=r"would both become 'a\.png\.model\.png'"):
        predicted(EDSR, [beside, whole], tmp_path / "out", beside=True)


def test_a_detector_that_finds_nothing_says_so(tmp_path):
    made = predicted(DETECTOR, [saved(tmp_path / "a.png", 40, 60, 3)], tmp_path / "out", threshold=0.99)
    assert made.rows == 0
    assert json.loads((tmp_path / "out" / "detections.json").read_text())["annotations"] == []
    np.testing.assert_array_equal(np.asarray(Image.open(made.files[0])), noise(40, 60, 3))


def test_a_gan_makes_the_same_pictures_of_the_same_seed(tmp_path):
    made = [predicted(GAN, [], tmp_path / str(i), count=5, seed=i // 2) for i in range(3)]
    assert [f.name for f in made[0].files] == [*(f"000{i}.png" for i in range(5)), "grid.png"]
    bytes_of = [[f.read_bytes() for f in each.files] for each in made]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
    assert Image.open(made[0].files[-1]).size == (3 * 66 - 2, 2 * 66 - 2)
    with pytest.raises(UserError, match=r"'a.png': a gan model reads no files; it makes pictures of --seed alone"):
        predicted(GAN, [Path("a.png")], tmp_path / "4")


def test_what_a_kind_does_not_know_is_refused(tmp_path, monkeypatch):
    file = saved(tmp_path / "a.png", 8, 8)
    with pytest.raises(UserError, match=r"--count is no option of super-resolution models; theirs: --beside, --window"):
        predicted(EDSR, [file], tmp_path / "out", count=3)
    with pytest.raises(UserError, match=r"window \[3.0, 2.0\]: its first number is to be below"):
        predicted(EDSR, [file], tmp_path / "out", window=(3, 2))
    with pytest.raises(UserError, match=r"--threshold: 2"):
        predicted(DETECTOR, [file], tmp_path / "out", threshold=2)
    with pytest.raises(UserError, match="needs files, or folders of them"):
        predicted(EDSR, [], tmp_path / "out")
    with pytest.raises(UserError, match="there is no file"):
        predicted(EDSR, [tmp_path / "none.png"], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the folder that the command runs in; name a new one"):
        predicted(EDSR, [file], Path("."))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(UserError, match="exists and is not empty; use a new --out"):
        predicted(EDSR, [file], tmp_path / "out")


def prompts(folder: Path) -> list[Path]:
    """A text, and rows of all three kinds."""
    rows = [
        {"prompt": "What is 2 + 3?"},
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "learned"}]},
        {"text": "Once upon a time"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]},
    ]
    (folder / "a.txt").write_text("Two lines\nof one prompt\n")
    (folder / "b.jsonl").write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    return [folder / "a.txt", folder / "b.jsonl"]


def answers(made: Predictions) -> list[dict[str, Any]]:
    return [json.loads(line) for line in made.files[0].read_text().splitlines()]


def test_prompts_from_files_and_from_the_command(tiny_llama, tmp_path):
    model = base_of(tiny_llama, "float32")
    made = predicted(model, prompts(tmp_path), tmp_path / "out", prompts=("Hello",), max_new_tokens=5)
    rows = answers(made)
    assert [(row["file"], row["line"]) for row in rows] == [
        (None, 1), ("a.txt", 1), ("b.jsonl", 1), ("b.jsonl", 3), ("b.jsonl", 5), ("b.jsonl", 7)
    ]  # fmt: skip
    assert rows[1]["prompt"] == "Two lines\nof one prompt"
    assert rows[3]["messages"] == [{"role": "user", "content": "Hi."}]
    assert [row["settings"]["chat_template"] for row in rows] == [True, True, True, True, False, True]
    assert all(row["tokens"] == 5 and row["stop"] == "length" for row in rows)
    assert rows[0]["settings"] == {"max_new_tokens": 5, "temperature": 0.0, "chat_template": True}
    tokenizer: Any
    with model.open("cpu") as loaded:
        tokenizer = loaded.processor
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        expected = loaded.module.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert rows[0]["answer"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert rows[0]["prompt_tokens"] == ids.shape[1]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_text_does_not_depend_on_what_stands_beside_it(temperature, tiny_llama, tmp_path):
    model = base_of(tiny_llama, "float32")
    how = {"max_new_tokens": 6, "temperature": temperature, "seed": 3}
    together = answers(predicted(model, [], tmp_path / "1", prompts=("one", "two", "three", "two"), **how))
    alone = answers(predicted(model, [], tmp_path / "2", prompts=("two",), **how))
    assert together[1]["answer"] == alone[0]["answer"]
    assert (together[3]["answer"] == alone[0]["answer"]) is (temperature == 0), "a prompt twice is drawn twice"
    other = answers(predicted(model, [], tmp_path / "3", prompts=("two",), **{**how, "seed": 4}))
    assert (other[0]["answer"] == alone[0]["answer"]) is (temperature == 0)


def test_bad_prompts_are_named_by_their_line(tiny_llama, tmp_path):
    model = base_of(tiny_llama)
    cases = {
        '{"prompt": "a"}\n{"prompt": ': "bad.jsonl:2: not JSON",
        '{"question": "a"}': "bad.jsonl:1: has no column 'messages', 'prompt', 'text'; its columns: question",
        "[1]": "bad.jsonl:1: a row is one JSON object",
        '{"prompt": " "}': "bad.jsonl:1: column 'prompt' is empty",
        '{"prompt": 3}': "bad.jsonl:1: column 'prompt' is 3, not text",
        '{"messages": [{"role": "assistant", "content": "x"}]}': "bad.jsonl:1: column 'messages' has no turn to answer",
        '{"prompt": "\\ud800"}': "bad.jsonl:1: cannot be used: half a character",
        "\n": "bad.jsonl: holds no prompt",
        json.dumps({"prompt": "word " * 300}): "bad.jsonl:1: .* tokens; the model has 512 positions",
    }
    for text, said in cases.items():
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(UserError, match=said):
            predicted(model, [tmp_path / "bad.jsonl"], tmp_path / "out", max_new_tokens=2)
        assert not (tmp_path / "out").exists()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "word " * 300}))
    made = predicted(model, [tmp_path / "bad.jsonl"], tmp_path / "out", True, max_new_tokens=2)
    assert (made.rows, list(made.skipped)) == (1, [f"{tmp_path / 'bad.jsonl'}:2"])
    (tmp_path / "a.pdf").touch()
    with pytest.raises(UserError, match=r"prompts are read from .txt and .jsonl files, or given by --prompt"):
        predicted(model, [tmp_path / "a.pdf"], tmp_path / "out2")
    with pytest.raises(UserError, match=r"--system 'Be brief.' needs a chat template, and --raw leaves it out"):
        predicted(model, [], tmp_path / "out2", prompts=("a",), system="Be brief.", raw=True)


def test_an_answer_ends_where_the_positions_do(tiny_llama, tmp_path):
    made = predicted(base_of(tiny_llama), [], tmp_path / "1", prompts=("word " * 165,), raw=True)
    (row,) = answers(made)
    assert row["prompt_tokens"] > 480
    assert (row["stop"], row["prompt_tokens"] + row["tokens"]) == ("positions", 512)


def test_tools_that_the_template_leaves_out_are_refused(tiny_llama, llmq, tmp_path):
    """The model would answer without them, and the row of the answers would hold them all the same."""
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    row = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    code, _, err = llmq("predict", tiny_llama, tmp_path / "asked.jsonl", "--out", tmp_path / "out")
    assert (code, "leaves the tool 'look_up' out; ask without tools" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_share_to_draw_from_without_drawing_is_refused(tiny_llama, llmq):
    code, _, err = llmq("predict", tiny_llama, "--prompt", "Hi", "--top-p", 0.5)
    assert (code, err) == (2, "llmq: --top-p 0.5 has no effect at --temperature 0, which draws nothing; set both")


def test_the_command(tiny_llama, tmp_path, llmq):
    code, out, err = llmq("predict", tiny_llama, "--prompt", "Hi", "--out", tmp_path / "1", "--max-new-tokens", 3)
    assert (code, out) == (0, f"{tmp_path / '1'}: 1 results, in 1 files\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    words = ["predict", tiny_llama, *prompts(tmp_path), tmp_path / "bad.txt", "--max-new-tokens", 2]
    code, out, err = llmq(*words, "--out", tmp_path / "2")
    assert (code, out) == (2, "")
    assert "bad.txt:1: not UTF-8 text" in err
    assert not (tmp_path / "2").exists()
    code, out, err = llmq(*words, "--out", tmp_path / "2", "--skip-bad", "--json")
    told = json.loads(out)
    assert (code, told["rows"], told["inputs"], list(told["skipped"])) == (0, 5, 2, [str(tmp_path / "bad.txt")])
    assert told["files"] == [str(tmp_path / "2" / "answers.jsonl")]
    code, out, err = llmq("predict", tiny_llama, "--prompt", "Hi", "--temperature", -1)
    assert code == 2
    code, out, err = llmq("predict", tiny_llama, "--prompt", "Hi", "--top-p", 0, "--out", tmp_path / "3")
    assert (code, "--top-p: 0.0 is wrong" in err) == (2, True)


def test_python_says_the_same(tmp_path, monkeypatch):
    import llmq

    monkeypatch.chdir(tmp_path)
    artifact = base(EDSR)
    stage = tmp_path / "0-base"
    stage.mkdir()
    artifact.save(stage)
    file = saved(tmp_path / "a.png", 12, 10)
    made = llmq.predict(stage, file, beside=True)
    assert made.folder == Path("runs/predict-0-base")
    assert made.files[0].read_bytes() == predicted(artifact, [file], tmp_path / "1").files[0].read_bytes()
    assert llmq.predict(stage, [file], out=tmp_path / "2").rows == 1


@pytest.mark.slow
def test_a_graph_of_openvino_answers_as_its_own_generation_does(tiny_llama, tmp_path):
    pytest.importorskip("openvino")
    exported = apply("export.openvino", base_of(tiny_llama, "float32"), tmp_path / "stage")
    how = {"max_new_tokens": 6, "raw": True}
    drawn = [
        answers(predicted(exported, [], tmp_path / str(i), prompts=prompts, temperature=1.0, **how))
        for i, prompts in enumerate((("one", "two"), ("two",)))
    ]
    assert drawn[0][1]["answer"] == drawn[1][0]["answer"]
    (row,) = answers(predicted(exported, [], tmp_path / "2", prompts=("one two",), **how))
    with exported.open("cpu") as loaded:
        ids = loaded.processor("one two", return_tensors="pt").input_ids
        expected = loaded.module.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row["answer"] == loaded.processor.decode(expected, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["quantize.float16", "export.onnx"])
def test_an_exported_network_enlarges_by_tiles_too(word, tmp_path):
    pytest.importorskip("openvino" if word == "quantize.float16" else "onnxruntime")
    edsr = base({"edsr": {"n_resblocks": 2, "n_feats": 32, "scale": 2, "tile": 16}})  # float16 is to shrink it
    exported = apply(word, edsr, tmp_path / "stage")
    whole = edsr.model.model_copy(update={"tile": None})  # a graph's layers take less memory than torch's
    assert [whole.tile_of(Loaded(None, None, "cpu", each)) for each in (edsr, exported)] == [256, 512]
    file = saved(tmp_path / "a.tif", 2, 21, 30, kind="uint16")
    ours, theirs = (
        tifffile.imread(predicted(each, [file], tmp_path / f"{i}", window=(0, 65535)).files[0]).astype(float)
        for i, each in enumerate((exported, edsr))
    )
    assert ours.shape == (2, 42, 60)
    assert np.abs(ours - theirs).max() < 65535 * (0.01 if word == "quantize.float16" else 1e-3)
