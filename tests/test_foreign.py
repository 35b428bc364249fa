"""Graphs that somebody exported, opened as a model of a kind: as exact as the network, or refused with the reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, apply
from PIL import Image
from torch import Tensor, nn

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.vision.images import Example

CLASSES = 3


class Cells(nn.Module):
    """A small network with the head of a YOLO: one cell for each 8 x 8 pixels."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, numbers, 3, 2, 1)
        )
        for layer in self.body[::2]:  # so that places differ
            nn.init.normal_(layer.weight, std=2 * (9 * layer.in_channels) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.body(images - 0.5).flatten(2)  # (n, numbers, cells)
        return torch.cat([cells[:, :4].sigmoid() * 32, cells[:, 4:].sigmoid()], 1)


class Rows(Cells):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).transpose(1, 2)


class Queries(Cells):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.body(images - 0.5).flatten(2).transpose(1, 2)  # (n, cells, numbers)
        return 3 * cells[..., 4:], cells[..., :4].sigmoid()


class Maps(Cells):
    def forward(self, images: Tensor) -> Tensor:
        cells = self.body(images - 0.5)
        return torch.cat([cells[:, :1].sigmoid(), cells[:, 1:5], cells[:, 5:].softmax(1)], 1)


class Scores(Cells):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.body(images - 0.5).flatten(2).transpose(1, 2)  # (n, cells, numbers)
        half = cells[..., 2:4].sigmoid() / 4
        return cells[..., 4:].softmax(-1), torch.cat(
            [cells[..., :2].sigmoid() - half, cells[..., :2].sigmoid() + half], -1
        )


HEADS: dict[str, tuple[type[Cells], int]] = {
    "yolov5": (Rows, 5 + CLASSES),
    "yolov8": (Cells, 4 + CLASSES),
    "fastestdet": (Maps, 5 + CLASSES),
    "ssd": (Scores, 5 + CLASSES),
    "detr": (Queries, 5 + CLASSES),
    "rtdetr": (Queries, 4 + CLASSES),
}


def write(network: nn.Module, file: Path, shape: tuple[int, ...], opset: int = 17, batch: bool = True) -> Path:
    """Export a network to ONNX, as its maker would."""
    names = ["images"]
    torch.onnx.export(
        network.eval(),
        (torch.zeros(shape),),
        str(file),
        input_names=names,
        opset_version=opset,
        dynamic_axes={"images": {0: "batch"}} if batch else None,
        dynamo=False,
    )
    return file


def opened(file: Path, **settings: Any) -> Artifact:
    model: Any = plugin.build({"exported": {"weights": str(file), **settings}}, "models")
    model.check()
    return model.base(CPU)


def some_images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def network_of(decoding: str) -> nn.Module:
    torch.manual_seed(0)
    head, numbers = HEADS[decoding]
    return head(numbers).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return {name: write(network_of(name), folder / f"{name}.onnx", (1, 3, 64, 64)) for name in HEADS}


def plainly(decoding: str, raw: Any, image: int) -> list[tuple[float, int, list[float]]]:
    """The candidates of one image, one after the other, by the words of each paper."""
    found = []
    if decoding in ("yolov5", "yolov8"):
        rows = raw[image] if decoding == "yolov5" else raw[image].T
        for row in rows.tolist():
            first = 5 if decoding == "yolov5" else 4
            chances = [c * (row[4] if first == 5 else 1) for c in row[first:]]
            x, y, w, h = row[:4]
            found.append((max(chances), chances.index(max(chances)), [x - w / 2, y - h / 2, x + w / 2, y + h / 2]))
    elif decoding == "fastestdet":
        rows, columns = raw.shape[2:]
        for r in range(rows):
            for c in range(columns):
                cell = raw[image, :, r, c]
                x, y = (float(cell[1].tanh()) + c) / columns * 64, (float(cell[2].tanh()) + r) / rows * 64
                w, h = float(cell[3].sigmoid()) * 64, float(cell[4].sigmoid()) * 64
                score = float(cell[0]) ** 0.6 * float(cell[5:].max()) ** 0.4
                found.append((score, int(cell[5:].argmax()), [x - w / 2, y - h / 2, x + w / 2, y + h / 2]))
    elif decoding == "ssd":
        for chances, box in zip(raw[0][image].tolist(), raw[1][image].tolist(), strict=True):
            found.append((max(chances[1:]), chances[1:].index(max(chances[1:])), [64 * v for v in box]))
    return found


def greedy(found: list[tuple[float, int, list[float]]], least: float, overlap: float) -> list[Any]:
    """Non-maximum suppression in its textbook form."""
    kept: list[Any] = []
    for score, label, box in sorted((f for f in found if f[0] >= least), key=lambda f: -f[0]):
        for _, other, b in kept:
            wide, high = min(box[2], b[2]) - max(box[0], b[0]), min(box[3], b[3]) - max(box[1], b[1])
            shared = max(0.0, wide) * max(0.0, high)
            areas = (box[2] - box[0]) * (box[3] - box[1]) + (b[2] - b[0]) * (b[3] - b[1])
            if other == label and shared / (areas - shared) > overlap:
                break
        else:
            kept.append((score, label, box))
    return kept


@pytest.mark.parametrize("decoding", ["yolov5", "yolov8", "fastestdet", "ssd"])
def test_detections_are_those_of_a_plain_decoding(decoding, files):
    stage = opened(files[decoding], is_a="detector", decoding=decoding, score_threshold=0.3, nms_threshold=0.5)
    images = some_images((64, 64), (64, 64))
    with stage.open("cpu") as loaded:
        ours = loaded.artifact.model.detect(loaded, images)
    inputs = torch.stack([torch.from_numpy(i).permute(2, 0, 1) / 255 for i in images])
    with torch.inference_mode():
        raw = network_of(decoding)(inputs)
    for i, made in enumerate(ours):
        wanted = greedy(plainly(decoding, raw, i), 0.3, 0.5)
        assert len(wanted) > 3
        assert made.labels.tolist() == [label for _, label, _ in wanted]
        assert np.allclose(made.scores, [score for score, _, _ in wanted], atol=1e-4)
        assert np.allclose(made.boxes, np.clip([box for _, _, box in wanted], 0, 64), atol=0.02)


@pytest.mark.parametrize("decoding", ["detr", "rtdetr"])
def test_queries_are_decoded_as_transformers_does(decoding, files):
    from types import SimpleNamespace

    from transformers import DetrImageProcessor, RTDetrImageProcessor

    stage = opened(files[decoding], is_a="detector", decoding=decoding, score_threshold=0.2)
    image = some_images((40, 80))
    with stage.open("cpu") as loaded:
        model = loaded.artifact.model
        (ours,) = model.detect(loaded, image)
        logits, boxes = loaded.module(model.prepare(image))
    processor = DetrImageProcessor() if decoding == "detr" else RTDetrImageProcessor()
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    (theirs,) = processor.post_process_object_detection(outputs, 0.2, [(40, 80)])
    order = theirs["scores"].argsort(descending=True, stable=True)
    assert len(order) > 3
    assert np.allclose(ours.scores, theirs["scores"][order].numpy())
    assert ours.labels.tolist() == theirs["labels"][order].tolist()
    edges = torch.tensor([80, 40, 80, 40])
    assert np.allclose(ours.boxes, theirs["boxes"][order].clamp(torch.zeros(4), edges.float()).numpy(), atol=1e-3)


def test_a_letterboxed_image_gets_its_boxes_back(files):
    model: Any = opened(files["yolov8"], is_a="detector", decoding="yolov8").model
    image = np.zeros((20, 40, 3), np.uint8)
    inputs, filled, _ = model.fit([image])
    assert filled == [(32, 64)]
    assert torch.equal(inputs[0, :, 16:48], torch.zeros(3, 32, 64))
    assert inputs[0, 0, 0, 0] == pytest.approx(114 / 255)
    box = torch.tensor([32.0, 32.0, 16.0, 16.0, 0.9, 0.0, 0.0])  # in the middle
    (found,) = model.decode((box[None, :, None],), filled, [(20, 40)])
    assert found.boxes.tolist() == [[15, 5, 25, 15]]


@pytest.mark.parametrize("opset", [11, *(pytest.param(n, marks=pytest.mark.slow) for n in (13, 17)), 20])
def test_a_classifier_of_any_opset_gives_the_logits_of_timm(opset, tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=10).eval()
    file = write(network, tmp_path / "net.onnx", (1, 3, 64, 64), opset, batch=opset != 13)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    stage = opened(file, is_a="classifier", mean=mean, std=std, crop_pct=1.0)
    assert (stage.runtime, stage.packed) == ("openvino", False)
    images = some_images((64, 64), (64, 64), (64, 64))
    with stage.open("cpu") as loaded:
        ours = loaded.artifact.model.logits(loaded, images)
    inputs = torch.stack([torch.from_numpy(i).permute(2, 0, 1) / 255 for i in images])
    inputs = (inputs - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.inference_mode():
        assert torch.allclose(ours, network(inputs), atol=1e-4)


@pytest.mark.parametrize(
    ("interpolation", "mode", "crop"),
    [("bilinear", "center", 0.875), ("bicubic", "center", 0.9), ("bicubic", "squash", 1)],
)
@pytest.mark.parametrize("size", [(61, 97), (40, 33), (97, 64)])
def test_a_classifier_sees_what_torchvision_cuts_out(interpolation, mode, crop, size, tmp_path):
    """Odd sizes, smaller and larger than the input: as the transforms of an evaluation, to the bit."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

    file = write(nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 4)), tmp_path / "net.onnx", (1, 3, 48, 48))
    scaling = {"interpolation": interpolation, "crop_mode": mode, "crop_pct": crop}
    model: Any = opened(file, is_a="classifier", **scaling).model
    (image,) = some_images(size)
    side = int(48 / crop)
    steps = [
        Resize((side, side) if mode == "squash" else side, InterpolationMode(interpolation)),
        CenterCrop(48),
        ToTensor(),
    ]
    assert torch.allclose(model.prepare([image])[0], Compose(steps)(Image.fromarray(image)), atol=1e-6)


def bilinear(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The definition: pixel centres, four neighbours, no averaging."""

    def places(n: int, of: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(n) + 0.5) * of / n - 0.5, 0, of - 1)
        first = np.floor(at).astype(int)
        return first, np.minimum(first + 1, of - 1), at - first

    (top, bottom, down), (left, right, across) = places(rows, image.shape[0]), places(columns, image.shape[1])
    across = across[None, :, None]
    upper, lower = (image[r][:, left] * (1 - across) + image[r][:, right] * across for r in (top, bottom))
    return upper * (1 - down)[:, None, None] + lower * down[:, None, None]


def test_a_yolo_sees_what_opencv_scales_and_another_what_pillow_does(files):
    (image,) = some_images((150, 99))
    yolo: Any = opened(files["yolov8"], is_a="detector", decoding="yolov8").model
    inputs, ((rows, columns),), _ = yolo.fit([image])
    assert (rows, columns) == (64, 42)
    seen = (inputs[0, :, :, 11:53] * 255).permute(1, 2, 0).numpy()
    assert np.abs(seen - bilinear(image, 64, 42)).max() <= 0.501  # rounded to bytes
    detr: Any = opened(files["detr"], is_a="detector", decoding="detr").model
    pillow = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR), np.float32)
    assert np.abs((detr.fit([image])[0][0] * 255).permute(1, 2, 0).numpy() - pillow).max() <= 1.01
    averaging: Any = opened(files["yolov8"], is_a="detector", decoding="yolov8", antialias=True).model
    assert np.abs((averaging.fit([image])[0] - inputs).numpy()).max() > 0.1


def test_what_a_decoding_cannot_mean_is_refused(files, tmp_path):
    model: Any = opened(files["yolov8"], is_a="detector", decoding="yolov8").model

    def decoded(model: Any, *row: float) -> Any:
        raw = torch.tensor(row)[None, :, None] if model.decoding == "yolov8" else torch.tensor(row)[None, None]
        return model.decode((raw,), [(64, 64)], [(64, 64)])

    assert len(decoded(model, 32, 32, 8, 8, 0.9, 0, 0)[0].boxes) == 1
    with pytest.raises(UserError, match=r"gives scores from 7 to 7, and decoding: yolov8 needs chances"):
        decoded(model, 32, 32, 8, 8, 7.0, 0, 0)
    with pytest.raises(UserError, match=r"gives boxes up to 0\.75, and .* needs pixels of its input, no shares"):
        decoded(model, 0.5, 0.5, 0.5, 0.5, 0.9, 0, 0)
    assert not len(decoded(model, 0.5, 0.5, 0.5, 0.5, 0.01, 0, 0)[0].boxes)  # nothing was found
    graph: Any = model.model_copy(update={"decoding": "boxes"})
    assert decoded(graph, 8, 8, 40, 50, 0.9, 1)[0].boxes.tolist() == [[8, 8, 40, 50]]
    with pytest.raises(
        UserError, match=r"gives boxes that end before they begin, and .* needs corners: x0, y0, x1, y1"
    ):
        decoded(graph, 32, 32, 8, 8, 0.9, 1)


def test_classes_go_by_number_only_where_there_are_as_many(files):
    from llmq.types import Split

    model: Any = opened(files["yolov8"], is_a="detector", decoding="yolov8").model
    assert model.places(Split([], [], "image/boxes", {}, "0", ("a", "b", "c"))) is None
    fewer = Split([], [], "image/boxes", {}, "0", ("b", "c"))
    with pytest.raises(UserError, match="tells 3 classes apart, and the data has 2; set labels"):
        model.places(fewer)
    model.check_split(fewer)  # it calibrates
    assert model.model_copy(update={"labels": ("N/A", "b", "c")}).places(fewer) == [1, 2]


def test_chances_are_not_taken_for_logits(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(1))
    file = write(network, tmp_path / "net.onnx", (1, 3, 8, 8))
    images = some_images((8, 8), (8, 8))
    with opened(file, is_a="classifier").open("cpu") as loaded, pytest.raises(UserError, match="set chances: true"):
        loaded.artifact.model.logits(loaded, images)
    with opened(file, is_a="classifier", chances=True, crop_pct=1.0).open("cpu") as loaded:
        made = loaded.artifact.model.logits(loaded, images)
    wanted = network(torch.stack([torch.from_numpy(i).permute(2, 0, 1) / 255 for i in images]))
    assert torch.allclose(made.exp(), wanted, atol=1e-5)


def test_channels_last_and_bgr_and_bytes_are_turned(tmp_path):
    class Middle(nn.Module):
        def forward(self, images: Tensor) -> Tensor:  # (n, rows, columns, channels), 0 to 255, BGR
            return images.mean((1, 2)) @ torch.eye(3)

    file = write(Middle(), tmp_path / "net.onnx", (1, 8, 8, 3))
    with pytest.raises(UserError, match=r"takes \[\?,8,8,3\] \(images, channels, rows, columns\)"):
        opened(file, is_a="classifier")
    stage = opened(file, is_a="classifier", layout="nhwc", colours="bgr", value_range=[0, 255], crop_pct=1.0)
    image = np.zeros((8, 8, 3), np.uint8)
    image[...] = (200, 100, 50)  # red first
    with stage.open("cpu") as loaded:
        assert np.allclose(loaded.artifact.model.logits(loaded, [image]), [[50, 100, 200]])


class Larger(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.interpolate(images, scale_factor=2.0, mode="nearest")


def test_super_resolution_makes_larger_images_of_any_size(tmp_path):
    file = tmp_path / "net.onnx"
    axes = {"images": {0: "n", 2: "h", 3: "w"}}
    layer = nn.Sequential(nn.Conv2d(1, 1, 1), Larger()).eval()
    nn.init.constant_(layer[0].weight, 1.0)
    nn.init.constant_(layer[0].bias, 0.0)
    torch.onnx.export(
        layer, (torch.zeros(1, 1, 16, 16),), str(file), input_names=["images"], dynamic_axes=axes, dynamo=False
    )
    stage = opened(file, is_a="super-resolution", scale=2, channels=1, value_range=[-1, 1], tile=16)
    low = some_images((30, 40))[0][..., :1]
    with stage.open("cpu") as loaded:
        made = loaded.artifact.model.upscale(loaded, low)
    assert np.allclose(made, low.repeat(2, 0).repeat(2, 1), atol=1e-3)
    with pytest.raises(UserError, match=r"answers with \[1, 1, 96, 96\] for one input, and a super-resolution gives"):
        opened(file, is_a="super-resolution", scale=4, channels=1)


@pytest.mark.slow
def test_int8_float16_and_dynamic_shrink_a_file_and_stay_alike(files, tmp_path):
    from llmq.types import Data, Split

    class Noise(Data):
        suits = frozenset({"detector"})

        @property
        def word(self) -> str:
            return "data.noise"

        def read(self) -> Split:
            examples = [
                Example(str(i), image, boxes=np.array([[0, 0, 9, 9]], np.float32), labels=np.array([0]))
                for i, image in enumerate(some_images(*[(64, 64)] * 4))
            ]
            return Split(examples, examples, "image/boxes", {}, "0", ("a", "b", "c"))

    stage = opened(files["rtdetr"], is_a="detector", decoding="rtdetr")
    small = apply("quantize.int8", stage, tmp_path / "int8", data=Noise(), samples=4, fast_bias_correction=True)
    small.save(tmp_path / "int8")
    assert small.notes["variance_kept"][0] > 0.9
    again = Artifact.load(tmp_path / "int8")
    with again.open("cpu") as loaded:
        assert len(loaded.artifact.model.detect(loaded, some_images((64, 64)))[0].boxes)
    for word in ("float16", "dynamic"):
        assert apply(f"quantize.{word}", stage, tmp_path / word).notes["size_ratio"] > 1.5


MISFITS = [
    ({"is_a": "classifier"}, r"answers with \[1, 7, 64\] for one input, and a classifier gives one output"),
    ({"is_a": "detector"}, "a detector needs its decoding: yolov5"),
    ({"is_a": "detector", "decoding": "fastestdet"}, r"answers with \[1, 7, 64\] for one image, and this decoding"),
    ({"is_a": "detector", "decoding": "yolov8", "classes": 4}, "tells 3 classes apart, and classes tells of 4"),
    ({"is_a": "detector", "decoding": "yolov8", "size": 96}, r"takes \[\?,3,64,64\].* of 96 x 96"),
    ({"is_a": "detector", "decoding": "yolov8", "channels": 1}, "these settings give 1 channels"),
    ({"is_a": "detector", "decoding": "yolov5"}, r"answers with \[1, 7, 64\], 59 classes by decoding: yolov5; take"),
    ({"is_a": "detector", "decoding": "rtdetr", "nms_threshold": 0.5}, "decoding: rtdetr suppresses no boxes"),
    ({"is_a": "classifier", "decoding": "yolov8"}, "decoding is no setting of a classifier"),
    ({"is_a": "detector", "decoding": "yolov8", "mean": [0, 0]}, "mean has 2 numbers"),
    ({"is_a": "classifier", "mean": [123.7]}, r"mean 123.7 is not of images in value_range \[0.0, 1.0\]; set both"),
    ({"is_a": "classifier", "mean": [0.4], "std": [0.2], "value_range": [0, 255]}, "std 0.2 is not of images in"),
    ({"is_a": "classifier", "antialias": True}, "antialias is no setting of a classifier"),
]


@pytest.mark.parametrize(("settings", "message"), MISFITS)
def test_a_file_that_does_not_fit_is_refused_with_its_shapes(settings, message, files):
    with pytest.raises(UserError, match=message):
        opened(files["yolov8"], **settings)


def plain(file: Path, kind: str) -> Path:
    """The mean of the pixels of each channel, times weights, of 8 x 8 pixels in numbers of a kind."""
    onnx = pytest.importorskip("onnx")
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        node("MatMul", ["means", "weights"], ["answers"]),
    ]
    held = [np.array([2, 3]), np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)]
    graph = onnx.helper.make_graph(
        nodes,
        "plain",
        [info("images", onnx.TensorProto.DataType.Value(kind), [1, 3, 8, 8])],
        [info("answers", onnx.TensorProto.FLOAT, [1, 4])],
        [onnx.numpy_helper.from_array(each, name) for each, name in zip(held, ("axes", "weights"), strict=True)],
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), file)
    return file


def test_whole_numbers_need_a_range_that_rounding_leaves(tmp_path):
    file = plain(tmp_path / "net.onnx", "UINT8")
    with pytest.raises(UserError, match=r"takes u8 numbers, and value_range \[0.0, 1.0\] leaves few of them; set"):
        opened(file, is_a="classifier")
    with opened(file, is_a="classifier", value_range=[0, 255]).open("cpu") as loaded:
        made = loaded.artifact.model.logits(loaded, some_images((8, 8)))
    assert float(made.abs().max()) > 20


def test_a_broken_file_is_one_line(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(LlmqError, match=r"net\.onnx") as error:
        opened(tmp_path / "net.onnx", is_a="classifier")
    assert "\n" not in str(error.value)


def test_weights_beside_an_onnx_file_are_part_of_it(tmp_path):
    onnx = pytest.importorskip("onnx")

    def file(seed: int, place: str = "net.onnx.data") -> Path:
        torch.manual_seed(seed)
        made = write(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 7)), tmp_path / "net.onnx", (1, 3, 8, 8))
        (tmp_path / "net.onnx.data").unlink(missing_ok=True)
        held = onnx.load(made)
        how = {"size_threshold": 0, "convert_attribute": False, "location": "net.onnx.data"}
        onnx.save_model(held, made, save_as_external_data=True, all_tensors_to_one_file=True, **how)
        made.write_bytes(made.read_bytes().replace(b"net.onnx.data", place.encode()))
        return made

    def logits() -> torch.Tensor:
        with opened(tmp_path / "net.onnx", is_a="classifier").open("cpu") as loaded:
            return loaded.module(torch.ones(1, 3, 8, 8))

    file(0)
    first = logits()
    file(1)
    assert not torch.allclose(logits(), first)
    file(1, place="../onnx.data_")
    with pytest.raises(LlmqError, match="outside the base directory"):
        logits()
    file(1, place="not.onnx.data")
    with pytest.raises(LlmqError, match=r"not\.onnx\.data"):
        logits()


@pytest.mark.parametrize("word", ["prune.magnitude", "prune.channels", "adapt.train"])
def test_training_and_pruning_are_refused_before_anything_runs(word, files):
    from llmq import recipe

    written = {
        "model": {"exported": {"weights": str(files["yolov8"]), "is_a": "detector", "decoding": "yolov8"}},
        "steps": [{word: {"data": "scenes"} if word == "adapt.train" else {}}],
        "evaluate": "detector",
    }
    with pytest.raises(UserError, match=f"{word}.*needs a stage in torch, and this one is in openvino"):
        recipe.built(recipe.Source("test", written), "test")


def test_boxes_that_the_graph_selects_are_taken_as_they_are_and_not_quantized(tmp_path):
    class Selected(Cells):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows = super().forward(images)[0].T  # (cells, 7)
            best, labels = rows[:, 4:].max(1)
            kept = torch.nonzero(best > 0.5)[:, 0]
            return torch.cat([rows[kept, :2], rows[kept, :2] + 9], 1), labels[kept] + 1, best[kept]

    torch.manual_seed(0)
    network = Selected(4 + CLASSES).eval()
    file = write(network, tmp_path / "net.onnx", (1, 3, 64, 64), batch=False)
    settings = {"is_a": "detector", "decoding": "boxes", "classes": 3, "first_label": 1, "max_detections": 300}
    stage = opened(file, **settings)
    images = some_images((64, 64), (64, 64))
    with stage.open("cpu") as loaded:
        found = loaded.artifact.model.detect(loaded, images)
    for made, image in zip(found, images, strict=True):
        with torch.inference_mode():
            _, labels, scores = network(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        order = scores.argsort(descending=True)
        assert len(order) > 3
        assert np.allclose(made.scores, scores[order], atol=1e-4)
        assert sorted(made.labels) == sorted((labels - 1).tolist())
    with pytest.raises(UserError, match="answers with as many rows as it finds"):
        apply("quantize.float16", stage, tmp_path / "f16")


@pytest.mark.slow
def test_int8_of_a_graph_for_one_image_is_written_as_onnx(tmp_path):
    class Wide(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).mean((2, 3))

    torch.manual_seed(0)
    network = Wide(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 2), nn.ReLU(), nn.Conv2d(64, 5, 1))
    stage = opened(write(network, tmp_path / "net.onnx", (1, 3, 64, 64), batch=False), is_a="classifier")
    for i, image in enumerate(some_images(*[(64, 64)] * 8)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    data = {"image_folder": {"path": str(tmp_path / "images"), "labels": False, "held_out": 0.2}}
    int8 = apply("quantize.int8", stage, tmp_path / "int8", data=data, fast_bias_correction=True)
    notes = apply("export.onnx", int8, tmp_path / "onnx").notes
    assert notes["batch_size"] == 1
    assert notes["largest_error_of_a_layer_in_steps"] <= 1


def small_classifier(folder: Path) -> Any:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)).eval()
    file = write(network, folder / "net.onnx", (1, 1, 16, 16))
    return plugin.build({"exported": {"weights": str(file), "is_a": "classifier", "channels": 1}}, "models")


def test_the_file_of_a_graph_foretells_its_sizes(tmp_path):
    model = small_classifier(tmp_path)
    sketch, base = model.sketch(), model.base(CPU)
    task: Any = plugin.build("size", "tasks")
    with base.open("cpu") as loaded:
        counted = {m.metric: m.value for m in task.score(loaded)}
    told = {"bytes_on_disk": sketch.on_disk, "bytes_in_memory": sketch.in_memory, "parameters": sketch.parameters}
    assert told == pytest.approx({name: counted[name] for name in told}, rel=1e-3)
    # Each output of a layer is a sum of products: two operations for each.
    places = (16 * 16 * 16 * 9, 8 * 8 * 32 * 16 * 9, 3 * 3 * 64 * 32 * 9, 64 * CLASSES)
    assert sketch.counted.operations == 2 * sum(places)


@pytest.mark.slow
def test_the_file_of_a_graph_foretells_its_int8(tmp_path):
    from llmq.vision.sizing import as_graph

    model = small_classifier(tmp_path)
    made = apply("quantize.int8", model.base(CPU), tmp_path / "made", data="digits", samples=4)
    assert as_graph(model.sketch(), 8, True).on_disk == pytest.approx(made.bytes_on_disk, rel=0.1)  # text varies


def test_a_graph_that_is_not_there_foretells_nothing():
    model: Any = plugin.build({"exported": {"weights": "no.onnx", "is_a": "classifier"}}, "models")
    assert model.sketch().unknown == "there is no file 'no.onnx', and only the file of a graph tells its size"


@pytest.mark.slow
def test_a_file_of_llmq_tells_what_it_takes(tmp_path, capsys):
    """Opened again by its file alone it sees what the network saw; what is set goes before what is told."""
    settings = {
        "architecture": "test_resnet",
        "classes": 4,
        "input_size": 32,
        "channels": 1,
        "mean": [0.4],
        "std": [0.3],
    }
    named = {"label_names": ["a", "b", "c", "d"], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "squash"}
    model: Any = plugin.build({"timm_classifier": settings | named}, "models")
    file = apply("export.onnx", model.base(CPU), tmp_path / "out").weights / "model.onnx"
    images = some_images((50, 41), (20, 64))
    with model.base(CPU).open("cpu") as loaded, opened(file, is_a="classifier").open("cpu") as again:
        wanted = loaded.artifact.model.logits(loaded, images)
        ours: Any = again.artifact.model
        assert torch.allclose(ours.logits(again, images), wanted, atol=1e-4)
        assert (ours.labels, ours.classes, ours.size) == (("a", "b", "c", "d"), 4, (32, 32))
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "model.onnx: channels, classes, crop_mode, crop_pct, interpolation, labels, mean, std as llmq wrote them"
        in said
    )
    assert str(tmp_path).encode() not in file.read_bytes()
    stage = apply("quantize.float16", model.base(CPU), tmp_path / "stage")
    stage.save(tmp_path / "stage")
    beside: Any = opened(tmp_path / "stage" / "model.xml", is_a="classifier").model
    assert (beside.mean, beside.labels, beside.crop_mode) == ((0.4,), ("a", "b", "c", "d"), "squash")
    own: Any = opened(file, is_a="classifier", mean=[0.5], std=[0.3]).model
    assert (own.mean, own.crop_pct) == ((0.5,), 0.9)


SOFTMAX = ("detr", "yolos")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "opset"), [("detr", 14), ("detr", 20), ("yolos", 14), ("yolos", 20), ("rt_detr", 16), ("rt_detr", 20)]
)
def test_a_detector_of_transformers_as_torch_exports_it_finds_what_transformers_finds(family, opset, tmp_path):
    """From the first opset on that has its operations. The batch norms have seen data, or scores are all alike."""
    from test_hf_detector import CONFIGS
    from transformers import AutoConfig, AutoModelForObjectDetection, DetrImageProcessor, RTDetrImageProcessor

    class Outputs(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            made = network(pixel_values=images)
            return made.logits, made.pred_boxes

    torch.manual_seed(0)
    network = AutoModelForObjectDetection.from_config(AutoConfig.for_model(family, **CONFIGS[family]))
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.train().momentum = None
    with torch.inference_mode():
        network(pixel_values=torch.rand(8, 3, 64, 64))
    holder = Outputs()
    holder.network = network.eval()
    file = write(holder, tmp_path / "net.onnx", (1, 3, 64, 64), opset, batch=False)
    decoding = "detr" if family in SOFTMAX else "rtdetr"
    stage = opened(file, is_a="detector", decoding=decoding, score_threshold=0.0)
    (image,) = some_images((64, 64))
    with stage.open("cpu") as loaded:
        (ours,) = loaded.artifact.model.detect(loaded, [image])
    with torch.inference_mode():
        outputs = network(pixel_values=torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    processor = DetrImageProcessor() if family in SOFTMAX else RTDetrImageProcessor()
    (theirs,) = processor.post_process_object_detection(outputs, 0.0, [(64, 64)])
    order = theirs["scores"].argsort(descending=True, stable=True)
    assert len(order) >= 10
    assert np.allclose(ours.scores, theirs["scores"][order].numpy(), atol=1e-4)
    assert ours.labels.tolist() == theirs["labels"][order].tolist()
    assert np.allclose(ours.boxes, theirs["boxes"][order].clamp(0, 64).numpy(), atol=0.02)
