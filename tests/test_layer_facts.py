"""The facts about changed layers: true, kept through a kill, and drawn."""

import json

import numpy as np
import pytest
import torch
from helpers import CPU, apply, base_of
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq import plugin
from llmq.files import LAYERS
from llmq.matrix.layer_error import layer_error
from llmq.report import layers
from llmq.text import blockwise

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"bits": 4, "group_size": 32, "samples": 4, "length": 64}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 12))
def test_the_error_is_that_of_the_outputs(seed, outputs, inputs):
    torch.manual_seed(seed)
    before, made, x = torch.randn(outputs, inputs), torch.randn(outputs, inputs), torch.randn(inputs, 50)
    true = ((before - made) @ x).norm() / (before @ x).norm()
    assert layer_error(before, made, x @ x.T) == pytest.approx(float(true), rel=1e-3)
    assert layer_error(before, made) == pytest.approx(float((before - made).norm() / before.norm()), rel=1e-5)
    assert layer_error(before, before, x @ x.T) == 0


def test_a_layer_of_zeros_has_no_error_or_an_infinite_one():
    zeros = torch.zeros(3, 4)
    assert layer_error(zeros, zeros) == 0
    assert layer_error(zeros, zeros + 1) == float("inf")


def test_gptq_leaves_less_error_than_rounding_and_more_in_fewer_bits(tiny_llama, tmp_path):
    base = base_of(tiny_llama)
    mixed = {**SETTINGS, "modules": {"down_proj": {"bits": 8}, "q_proj": "skip"}}
    stage = apply("quantize.gptq", base, tmp_path / "gptq", **mixed)
    facts = json.loads((stage.weights / LAYERS).read_text())
    assert len(facts) == 12  # 7 layers in each of 2 blocks, less a skipped one
    assert not any("q_proj" in name for name in facts)
    for name, its in facts.items():
        assert its["bits"] == (8 if "down_proj" in name else 4)
        assert its["error_of"] == "outputs"
        assert 0 < its["error"] < (0.02 if its["bits"] == 8 else 0.3)
    rounded = apply("quantize.rtn", base, tmp_path / "rtn", bits=4, group_size=32)
    assert {its["error_of"] for its in json.loads((rounded.weights / LAYERS).read_text()).values()} == {"weights"}


def test_zeros_of_a_pruned_model_are_counted(tiny_llama, tmp_path):
    stage = apply("prune.magnitude", base_of(tiny_llama), tmp_path / "pruned", sparsity=0.5)
    facts = json.loads((stage.weights / LAYERS).read_text())
    assert {its["zeros"] for its in facts.values()} == {0.5}
    assert {its["bits"] for its in facts.values()} == {None}
    titles = [title for title, _ in layers._maps(facts, True)]
    assert [title.split(",")[0] for title in titles] == [
        "error of 14 layers beside the stage before",
        "share of weights that are zero",
    ]


@pytest.mark.slow
def test_facts_survive_a_kill(tiny_llama, tmp_path, monkeypatch):
    base = base_of(tiny_llama)
    whole = apply("quantize.gptq", base, tmp_path / "whole", **SETTINGS).weights / LAYERS
    written = blockwise.write

    def killed(tensors, file, facts=None):
        written(tensors, file, facts)
        raise KeyboardInterrupt

    step = plugin.build({"quantize.gptq": SETTINGS})
    folder = tmp_path / "killed"
    folder.mkdir()
    monkeypatch.setattr(blockwise, "write", killed)
    for _ in range(2):  # after the first block, and after the second
        with pytest.raises(KeyboardInterrupt):
            step.apply(base, folder, CPU)
    monkeypatch.setattr(blockwise, "write", written)
    step.apply(base, folder, CPU)
    assert (folder / LAYERS).read_bytes() == whole.read_bytes()
    assert not list(folder.glob("*.layers.json"))


def test_image_networks_have_facts_too(tmp_path):
    base = plugin.build({"timm_classifier": {"architecture": "test_resnet", "classes": 7, "input_size": 32}}, "models")
    stage = apply("prune.magnitude", base.base(CPU), tmp_path / "pruned", sparsity=0.3)
    facts = json.loads((stage.weights / LAYERS).read_text())
    assert len(facts) > 5
    assert all(0.25 < its["zeros"] < 0.35 for its in facts.values())


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("model.layers.12.self_attn.q_proj", ("self_attn.q_proj", 12)),
        ("model.layers.3.mlp.experts.7.up_proj", ("mlp.experts.up_proj", 3)),
        ("lm_head", ("lm_head", 0)),
    ],
)
def test_a_layer_has_a_place_in_the_map(layer, place):
    assert layers.place_of(layer) == place


def test_weights_of_4_bits_are_read_number_by_number_depthwise_ones_as_well():
    pytest.importorskip("openvino")
    from openvino import Model, PartialShape, Shape, Type, opset13
    from openvino.op import Constant

    from llmq.vision.graph_layers import facts_of

    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 1, 2, 2)

    def graph(packed: bool) -> Model:
        image = opset13.parameter(PartialShape([1, 4, 8, 8]), Type.f32)
        scale = opset13.constant(np.full((4, 1, 1, 1), 0.5, np.float32))
        weight = opset13.constant(0.5 * codes.astype(np.float32).reshape(4, 1, 1, 2, 2))
        if packed:
            nibbles = Constant(Type.i4, Shape([4, 1, 2, 2]), codes.reshape(-1).tolist())
            floats = opset13.multiply(opset13.convert(nibbles, "f32"), scale)
            weight = opset13.reshape(floats, opset13.constant(np.array([4, 1, 1, 2, 2])), special_zero=False)
        around = [1, 1], [0, 0], [0, 0], [1, 1]
        layer = opset13.group_convolution(image, weight, *around)
        layer.set_friendly_name("__module.conv/GroupConvolution")
        return Model([layer], [image])

    facts = facts_of(graph(packed=False), graph(packed=True))
    assert facts["conv"]["bits"] == 4
    assert facts["conv"]["error"] == 0
