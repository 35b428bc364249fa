"""What `export.onnx` writes is opened by ONNX Runtime, ours and plain, to the outputs of the stage before."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import CPU, apply
from test_int8 import Noise
from test_support_vision import MODELS, data_of, settled

from llmq import pipeline, plugin, recipe
from llmq.artifact import Artifact, Stage
from llmq.errors import LlmqError, UserError
from llmq.guarded.weights import stored_as
from llmq.questions import question
from llmq.source import Source
from llmq.types import Step
from llmq.vision.likeness import in_order_of
from llmq.vision.onnx import export as onnx_export
from llmq.vision.onnx.export import FLOAT, STEP, exact
from llmq.vision.onnx.layerwise import most_steps
from llmq.vision.onnx.library import FILE, OPSET
from llmq.vision.onnx.module import OnnxModule
from tests.exported_families import SIDE, base

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ("float", "quantize.int8", "quantize.dynamic", "quantize.float16")
STORED = {
    "float": "float32",
    "quantize.int8": "int8 and float32",
    "quantize.dynamic": "int8 and float32",
    "quantize.float16": "float16",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Artifact, Artifact]]:
    """Stages of the family of two heads, each with its export."""
    folder = tmp_path_factory.mktemp("onnx")
    heads, pairs = base(folder / "base"), {}
    for word in WORDS:
        data = {"data": Noise()} if word == "quantize.int8" else {}
        stage = heads if word == "float" else apply(word, heads, folder / word, **data)
        pairs[word] = stage, apply("export.onnx", stage, folder / f"{word}-onnx")
    return pairs


def answers(artifact: Artifact, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with artifact.open("cpu") as loaded, torch.inference_mode():
        module = exact(loaded.module.graph) if artifact.runtime == "openvino" else loaded.module
        said = module(x)
    return said if isinstance(said, tuple) else (said,)


def plain(file: Path, x: torch.Tensor) -> list[torch.Tensor]:
    """What ONNX Runtime says without a setting of ours."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {"input": x.numpy()})]


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference, as a share of the range."""
    assert found.shape == truth.shape
    return float((found - truth).abs().max() / (truth.max() - truth.min()))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("shape", [(1, 3, SIDE, SIDE), (3, 3, 9, 31)])
def test_it_says_what_the_stage_says_for_any_batch_and_size(made, word, shape):
    stage, export = made[word]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    tolerance = STEP if word == "quantize.int8" else FLOAT
    for truth, ours, theirs in zip(answers(stage, x), answers(export, x), plain(export.weights / FILE, x), strict=True):
        assert off(ours, truth) <= tolerance
        assert off(theirs, truth) <= STEP  # without our settings, activations may be rounded


@pytest.mark.parametrize("word", WORDS)
def test_the_stage_is_one_small_file_that_says_how_it_is_run(made, word):
    stage, export = made[word]
    assert (export.runtime, export.packed, export.adapter) == ("onnx", stage.packed, None)
    assert [f.name for f in export.weight_files()] == [FILE]
    assert export.bytes_on_disk < 1.1 * stage.bytes_on_disk
    assert stored_as(export.weight_files()) == STORED[word]
    model = onnx.load(export.weights / FILE)
    onnx.checker.check_model(model, full_check=True)
    assert [o.version for o in model.opset_import] == [OPSET]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == (3 if word == "quantize.int8" else 0)
    assert export.notes["compute_dtype"] == "float32"
    assert export.notes["activations"] == ("int8 (QDQ)" if word == "quantize.int8" else "float32")


def test_the_same_stage_gives_the_same_bytes(made, tmp_path):
    stage, export = made["quantize.int8"]
    again = apply("export.onnx", stage, tmp_path)
    assert (again.weights / FILE).read_bytes() == (export.weights / FILE).read_bytes()


def test_an_exported_stage_is_loaded_again_and_measured(tmp_path):
    model: Any = plugin.build(SMALL["dcgan"], "models")
    stage, step = model.base(CPU), plugin.build({"export.onnx": {}})
    export = pipeline.export(stage, step, tmp_path / "out", CPU)  # type: ignore[arg-type]
    assert (export.runtime, export.weights) == ("onnx", tmp_path / "out")
    counted = []
    for each in (stage, export):
        told = question(Stage(each.runtime, each), [plugin.build("size", "tasks")], tmp_path, "cpu", each)  # type: ignore[list-item]
        counted.append({m.metric: m.value for m in told.measurements})
    assert counted[1]["bytes_on_disk"] == (tmp_path / "out" / FILE).stat().st_size
    # Batch norms are folded: new ones add nothing.
    norms = sum(m.num_features for m in model.network().modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert counted[1]["parameters"] == counted[0]["parameters"] - 2 * norms
    speed: Any = plugin.build("speed", "tasks")
    with export.open("cpu") as loaded:
        clock = next(iter(speed.clocks(loaded)))
        clock.run()
    assert clock.convention.endswith("1 threads, cpu, onnx in float32")


def test_an_export_is_the_end_of_a_recipe(made):
    steps: list[Step] = [plugin.build({w: {}}) for w in ("export.onnx", "quantize.float16")]  # type: ignore[misc]
    with pytest.raises(UserError, match="in torch, and this one is in onnx"):
        recipe.check_order("detector", steps, Source("test", {}), made["float"][0])


def test_an_export_that_says_otherwise_leaves_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "STEP", 1e-9)
    monkeypatch.setattr(onnx_export, "NOISE", 0)
    with pytest.raises(LlmqError, match=r"^tests.*output \d of the ONNX file is off by .* of the range of its values"):
        apply("export.onnx", made["quantize.int8"][0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_int8_activation_is_within_one_step_of_the_graph(made):
    stage, export = made["quantize.int8"]
    with stage.open("cpu") as graph, export.open("cpu") as file:
        its = graph.module.graph, exact(graph.module.graph).graph
        x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
        steps, tail = most_steps(*its, file.module, x)
        assert steps <= 1
        assert tail <= FLOAT
        model = onnx.load_model_from_string(file.module.model)
        weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and "constant" in n.input[0]]
        scale = next(i for i in model.graph.initializer if i.name == weights[1].input[1])
        scale.CopyFrom(onnx.numpy_helper.from_array(1.2 * onnx.numpy_helper.to_array(scale), scale.name))
        file.module.model = model.SerializeToString()
        steps, tail = most_steps(*its, file.module, x)
        assert steps > 1 or tail > FLOAT


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "garbage": lambda b: b"\xff\xfe garbage",
    "an operation gone": lambda b: b.replace(b"Relu", b"Rulu"),
    "no numbers": lambda b: b[:-60000] + b"\xff" * 50000 + b[-10000:],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_one_line(made, fault, tmp_path):
    folder = Path(shutil.copytree(made["float"][1].weights, tmp_path / "m"))
    (folder / FILE).write_bytes(FAULTS[fault]((folder / FILE).read_bytes()))
    with pytest.raises(UserError) as error, replace(made["float"][1], weights=folder).open("cpu"):
        pass
    assert "\n" not in str(error.value)
    assert str(folder / FILE) in str(error.value)


def test_weights_in_another_file_are_not_read(made, tmp_path):
    model = onnx.load(made["float"][1].weights / FILE)
    (tmp_path / "m").mkdir()
    onnx.save(model, tmp_path / "m" / FILE, save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(UserError, match="keeps weights in other files"):
        OnnxModule(tmp_path / "m")


def test_an_input_that_does_not_fit_is_named(made):
    with made["float"][1].open("cpu") as loaded, pytest.raises(LlmqError, match=r"takes no input \[1, 4, 16, 16\]"):
        loaded.module(torch.zeros(1, 4, SIDE, SIDE))


SMALL: dict[str, Any] = {
    "dcgan": {"dcgan": {"features": 8, "latent_size": 8, "channels": 1}},
    "srcnn": {"srcnn": {}},
    "srresnet": {"srresnet": {}},
    "edsr": {"edsr": {"n_resblocks": 2}},
    "wdsr": {"wdsr": {"n_resblocks": 2}},
}
SHALLOW: dict[str, dict[str, Any]] = {
    "densenet121": {"block_config": [2, 2, 2, 2]},
    "edgenext_xx_small": {"depths": [2, 2, 2, 2]},
    "xcit_nano_12_p16_224": {"depth": 3},
    "vit_tiny_patch16_224": {"depth": 3},
    "deit_tiny_patch16_224": {"depth": 3},
}
"""Networks that repeat their blocks, with fewer of each kind."""
FAMILIES: dict[str, Any] = {**SMALL, **MODELS} | {
    name: {"timm_classifier": {**MODELS[name]["timm_classifier"], "model_args": its}} for name, its in SHALLOW.items()
}
ZERO_DIVISORS = ("edgenext_xx_small", "xcit_nano_12_p16_224")
"""Networks with positions whose divisors NNCF rounds to zero."""
ROUNDED = (
    "resnet10t", "efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002", "convnext_atto", "vit_tiny_patch16_224",
    "densenet121", *ZERO_DIVISORS, "edsr", "wdsr", "transformers vit", "torchvision fcos",
)  # fmt: skip
"""Networks exported in int8, too: one of each way to build a block."""
QUICK = ("srcnn", "dcgan")


class Pairs(Noise):
    """Small images beside large ones."""

    suits = frozenset({"super-resolution"})
    shape: str = "low/high"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_every_family_is_exported(name, tmp_path):
    model: Any = plugin.build(FAMILIES[name], "models")
    stage = model.base(CPU)
    stage = settled(stage, tmp_path / "base") if name in MODELS else stage
    export = apply("export.onnx", stage, tmp_path / "export")
    assert export.notes["largest_error"] <= FLOAT / 10
    if name not in ROUNDED:
        return
    its = {"data": data_of(model)} if name in MODELS else {"data": Pairs(channels=1)} if name != "dcgan" else {}
    try:
        small = apply("quantize.int8", stage, tmp_path / "int8", samples=8, fast_bias_correction=True, **its)
    except LlmqError:  # the table of `test_support_vision` says why
        return
    if name in ZERO_DIVISORS:
        with pytest.raises(LlmqError, match="output 0 of the ONNX file is no number"):
            apply("export.onnx", small, tmp_path / "q")
        return
    notes = apply("export.onnx", small, tmp_path / "q").notes
    assert notes["largest_error_unrounded"] <= FLOAT
    assert notes["largest_error"] <= max(STEP, notes["rounding_noise"])
    assert notes["largest_error_of_a_layer_in_steps"] <= 1
    assert notes["largest_error_after_the_last_rounding"] <= FLOAT


@pytest.mark.parametrize("mode", ["inside_sqrt", "outside_sqrt"])
def test_a_norm_keeps_its_epsilon(mode):
    from openvino import Model, opset13

    from llmq.vision.onnx.library import session
    from llmq.vision.onnx.operations import to_onnx

    x = opset13.parameter([-1, 8], np.float32)
    graph = Model([opset13.mvn(x, np.array([1]), True, 0.5, mode)], [x], "norm")
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    found = session(to_onnx(graph).SerializeToString(), 1).run(None, {"input": values})[0]
    variance = values.var(1, keepdims=True)
    divisor = np.sqrt(variance + 0.5) if mode == "inside_sqrt" else np.sqrt(variance) + 0.5
    assert np.abs(found - (values - values.mean(1, keepdims=True)) / divisor).max() < 1e-6


def test_places_and_truths_are_written():
    from openvino import Model, opset13

    from llmq.vision.onnx.library import session
    from llmq.vision.onnx.operations import to_onnx

    x = opset13.parameter([-1, 5, 4], np.float32)
    chosen = np.array([[[4, 0, 3, 1]], [[2, 2, 4, 0]]], np.int32)
    places, numbers = np.array([[1, 2], [0, 4]], np.int32), np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    positive = opset13.greater(x, np.float32(0))
    made = [
        opset13.gather_elements(x, chosen, 1),
        opset13.scatter_nd_update(x, places, numbers),
        opset13.gather_nd(x, places, 0),
        *(each(positive, np.array([2]), True) for each in (opset13.reduce_logical_and, opset13.reduce_logical_or)),
    ]
    graph = Model([each.output(0) for each in made], [x], "places")
    values = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    values[0, 0] = 1
    found = session(to_onnx(graph).SerializeToString(), 1).run(None, {"input": values})
    updated = values.copy()
    updated[[1, 0], [2, 4]] = numbers
    above = values > 0
    truths = [
        np.take_along_axis(values, chosen.astype(int), 1),
        updated,
        values[[1, 0], [2, 4]],
        above.all(2, keepdims=True),
        above.any(2, keepdims=True),
    ]
    for ours, truth in zip(found, truths, strict=True):
        assert np.array_equal(ours, truth)


def test_faster_rcnn_finds_the_same_in_padded_images(tmp_path):
    its = {"architecture": "faster_rcnn", "classes": 3, "size": 64, "max_detections": 20}
    model: Any = plugin.build({"torchvision_detector": its}, "models")
    stage = model.base(CPU)
    export = apply("export.onnx", stage, tmp_path)
    assert export.notes["largest_error"] <= FLOAT / 10
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    x[0, :, 40:] = 0
    x[1, :, :, 30:] = 0
    with stage.open("cpu") as torchs, export.open("cpu") as ours, torch.inference_mode():
        truths = torchs.module(x)
        found = in_order_of(truths, ours.module(x))
    assert float(truths[0][0, :, 3].max()) <= 40  # boxes end where the image does
    for made_of, truth in zip(found, truths, strict=True):
        assert float((made_of - truth).abs().max()) <= 1e-3


def test_a_range_for_each_channel_is_the_same_grid():
    from openvino import Model, opset13

    from llmq.vision.onnx.library import session
    from llmq.vision.onnx.operations import to_onnx

    low, high = -np.array([1.28, 0.5, 0], np.float32), np.array([1.27, 2.05, 2.55], np.float32)
    low, high = low.reshape(1, 3, 1, 1), high.reshape(1, 3, 1, 1)
    x = opset13.parameter([-1, 3, 4, 4], np.float32)
    graph = Model([opset13.fake_quantize(x, low, high, low, high, 256)], [x], "grid")
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    found = session(to_onnx(graph).SerializeToString(), 1).run(None, {"input": values})[0]
    step = (high - low) / 255
    truth = np.clip(np.round((values - low) / step), 0, 255) * step + low
    assert np.abs(found - truth).max() < 1e-5
