"""Scales that move from a layer into the one that feeds it, and AWQ, which chooses them."""

from types import SimpleNamespace

import pytest
import tiny_text_models
import torch
from helpers import apply, base_of, logits_of, reshaped, some_ids
from test_blockwise import assert_same_files, dense, stored

from llmq.layers import LayerChange
from llmq.matrix.grid import round_to_nearest
from llmq.quantize.awq import _Nearest, _Solved
from llmq.text.blockwise import rewrite
from llmq.text.feeders import Feeder
from llmq.text.grids import Grid
from llmq.text.skeleton import Skeleton

FEW = {"samples": 4, "length": 40, "group_size": 32}
FED = {
    "llama": {"self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"},  # grouped queries: v_proj is narrower than o_proj
    "gemma2": {"self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"},  # its norms multiply by 1 + weight
    "olmo": {"mlp.down_proj"},  # its norms have no weight
    "opt": {"self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"},  # relu(s x) is s relu(x)
    "phi": {"self_attn.q_proj"},  # attention and fc1 read one norm, and are one group
    "mixtral": {"self_attn.q_proj"},  # the router reads the norm of the experts, too
}
"""The first layer of each group that is fed by one layer alone; experts are left out."""


class Rescaling(LayerChange):
    """Scales by a factor of its own for each input, and keeps the weights as they are then."""

    gathers, rescales = "squares", True

    def __init__(self):
        self.scaled = []

    def wants(self, layer):
        return "layers" in layer

    def scales(self, layers, gram, magnitudes):
        self.scaled.append(next(iter(layers)))
        return torch.linspace(0.5, 3, len(gram))

    def change(self, layers, total):
        return {name: {"weight": weight} for name, weight in layers.items()}


@pytest.mark.parametrize("architecture", FED)
def test_a_scale_moves_from_a_group_into_its_feeder_and_changes_nothing(architecture, tiny_llama, tmp_path):
    source = tiny_text_models.build(architecture, tmp_path / "model", tiny_llama)
    module = dense(source)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and "norm" in name:  # no two channels of a norm are alike
            parameter.data += torch.linspace(0, 0.5, len(parameter))
    module.save_pretrained(source)
    change, windows = Rescaling(), some_ids(2, 48).tolist()
    (tmp_path / "out").mkdir()
    rewrite(Skeleton(source, "float32"), tmp_path / "out", change, windows)
    of_first = {name.split(".0.", 1)[1] for name in change.scaled if ".0." in name and "experts" not in name}
    assert of_first == FED[architecture]
    before, after = stored(source), stored(tmp_path / "out")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    expected = logits_of(module, some_ids())
    assert (logits_of(dense(tmp_path / "out"), some_ids()) - expected).norm() < 1e-4 * expected.norm()


def test_the_outputs_of_a_convolution_are_divided_channel_by_channel():
    conv, scales, x = torch.nn.Conv1d(6, 6, 4, groups=6), torch.linspace(0.5, 3, 6), torch.randn(2, 6, 9)
    made = Feeder("conv").divided(SimpleNamespace(module=torch.nn.ModuleDict({"conv": conv})), scales)
    after = torch.func.functional_call(conv, {name.removeprefix("conv."): p for name, p in made.items()}, (x,))
    torch.testing.assert_close(after * scales.unsqueeze(-1), conv(x))  # (2, channels, places)


def test_an_input_with_large_activations_is_rounded_on_a_finer_grid():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(48, 64, generator=generator), torch.randn(200, 64, generator=generator)
    inputs[:, 5] *= 100
    grid = Grid(group_size=32)
    scales = _Nearest({"a": grid}).scales({"a": weight}, inputs.t() @ inputs, inputs.abs().sum(0))
    assert scales.argmax() == 5
    assert len(scales) == 64

    def error(rounded):
        return float(((rounded - weight) @ inputs.t()).norm())

    scaled = round_to_nearest(weight * scales, 4, 32, True, True).weight() / scales
    assert error(scaled) < 0.8 * error(round_to_nearest(weight, 4, 32, True, True).weight())


def test_even_activations_ask_for_no_scales():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    scales = _Nearest({"a": Grid(group_size=32)}).scales({"a": weight}, torch.eye(64), torch.ones(64))
    assert torch.equal(scales, torch.ones(64))


def test_scales_are_never_worse_than_none_for_the_solver_that_rounds():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    inputs = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)  # correlated
    inputs[:, 5] *= 30
    gram, magnitudes = inputs.t() @ inputs, inputs.abs().sum(0)
    errors = {}
    for change in (_Nearest({"a": Grid(group_size=32)}), _Solved({"a": Grid(group_size=32)}, 0.05)):
        none, best = torch.ones(64), change.scales({"a": weight}, gram, magnitudes)
        errors[type(change)] = [change._error({"a": weight}, gram, scales) for scales in (none, best)]
        assert errors[type(change)][1] <= errors[type(change)][0]
    assert errors[_Solved][1] < errors[_Nearest][1]


@pytest.mark.parametrize("solver", ["nearest", pytest.param("gptq", marks=pytest.mark.slow)])
def test_groups_without_a_feeder_are_counted_and_all_layers_are_packed(solver, tiny_llama, tiny_jsonl, tmp_path):
    stage = apply("quantize.awq", base_of(tiny_llama), tmp_path / "s", **FEW, data=str(tiny_jsonl), solver=solver)
    assert stage.notes["groups_without_scales"] == 2  # o_proj of both blocks
    assert stage.notes["quantized_layers"] == 14
    names = stored(stage.weights).keys()
    assert sum(name.endswith(".qweight") for name in names) == 14
    with stage.open("cpu") as loaded:
        assert torch.isfinite(logits_of(loaded.module, some_ids())).all()


@pytest.mark.parametrize("solver", ["nearest", pytest.param("gptq", marks=pytest.mark.slow)])
def test_a_killed_awq_goes_on_to_the_same_bytes(solver, tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    settings = {**FEW, "data": str(tiny_jsonl), "solver": solver}
    source = base_of(reshaped(tiny_llama, tmp_path / "model", num_key_value_heads=4))
    apply("quantize.awq", source, tmp_path / "whole", **settings)
    scales = _Nearest.scales

    def killed(self, layers, gram, magnitudes):
        if "model.layers.1.mlp.down_proj" in layers:
            raise KeyboardInterrupt
        return scales(self, layers, gram, magnitudes)

    monkeypatch.setattr("llmq.quantize.awq._Scaled.scales", killed)
    with pytest.raises(KeyboardInterrupt):
        apply("quantize.awq", source, tmp_path / "out", **settings)
    monkeypatch.undo()
    assert (tmp_path / "out" / "model-00001-of-00003.safetensors").exists()
    apply("quantize.awq", source, tmp_path / "out", **settings)
    assert_same_files(tmp_path / "out", tmp_path / "whole")
