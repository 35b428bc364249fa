"""No stage counts whose weights are not finite, or of which a quantizer or a pruner has changed next to nothing."""

from dataclasses import replace

import pytest
import torch
from helpers import CPU, apply, base_of, reshaped
from safetensors.torch import load_file, save_file
from test_vision_magnitude import pruned

from llmq import pipeline, plugin, sound
from llmq.errors import LlmqError, UserError
from tests.exported_families import base as heads

FEW = {"samples": 2, "length": 16}
TEXT = {
    "quantize.bnb": {},
    "quantize.rtn": {"group_size": 32},
    "quantize.gptq": {"group_size": 32, **FEW},
    "quantize.awq": {"group_size": 32, **FEW},
    "prune.magnitude": {},
    "prune.wanda": FEW,
    "prune.sparsegpt": FEW,
    "prune.alps": FEW,
    "prune.layers": {"drop": 1, **FEW},
}
IMAGES = ("quantize.int8", "quantize.dynamic", "quantize.float16", "prune.channels")


def test_every_step_that_shrinks_is_held_to_it():
    found = [word for word in plugin.words() if word.startswith(sound.CHANGING)]
    assert sorted(found) == sorted({*TEXT, *IMAGES})


QUICK = ("quantize.rtn", "prune.magnitude", "prune.layers")


@pytest.mark.parametrize("word", [pytest.param(w, marks=() if w in QUICK else pytest.mark.slow) for w in TEXT])
def test_a_language_model_is_told_the_share_that_was_changed(word, tiny_llama, tmp_path):
    stage = apply(word, base_of(tiny_llama), tmp_path / "s", **TEXT[word])
    matrices, norms = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 2 * 2 * 64
    share = 0.5 if word == "prune.layers" else matrices / (matrices + norms)
    assert stage.notes["changed_share"] == pytest.approx(share, abs=1e-4)
    sound.check(word, stage, tmp_path / "s")


@pytest.mark.parametrize("word", [pytest.param("quantize.dynamic", marks=pytest.mark.slow), "quantize.float16"])
def test_an_image_model_is_told_the_share_that_was_changed(word, tmp_path):
    stage = apply(word, heads(tmp_path / "b"), tmp_path / "s")
    assert 0.9 < stage.notes["changed_share"] <= 1
    sound.check(word, stage, tmp_path / "s")


def test_a_pruned_image_model_too(tmp_path):
    _, stage = pruned(tmp_path / "made", sparsity=0.5)
    assert 0.8 < stage.notes["changed_share"] < 1


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("quantize.rtn", {"group_size": 32, "modules": {"layers.0.self_attn.k_proj": {"bits": 8}, "layers": "skip"}}),
        ("prune.magnitude", {"modules": {"layers.0.self_attn.k_proj": {"sparsity": 0.5}, "layers": "skip"}}),
    ],
)
def test_next_to_nothing_changed_is_refused_in_one_line(word, settings, tiny_llama, tmp_path):
    """One matrix of 64 x 32 in two blocks of 4 x 64 x 64 and more: 0.49 % of all weights."""
    base = base_of(reshaped(tiny_llama, tmp_path / "wide", intermediate_size=1024))
    (tmp_path / "s").mkdir()
    with pytest.raises(
        UserError, match=rf"^{word}: only 0\.49% of the weights were changed; leave the step out"
    ) as told:
        pipeline.applied(plugin.build({word: settings}), base, tmp_path / "s", CPU)
    assert "\n" not in str(told.value)


def test_the_head_alone_is_a_share_of_the_blocks_and_itself(tiny_llama, tmp_path):
    settings = {"group_size": 32, "bits": 8, "modules": {"layers": "skip", "lm_head": {"bits": 8}}}
    stage = apply(
        "quantize.rtn", base_of(reshaped(tiny_llama, tmp_path / "m", vocab_size=416)), tmp_path / "s", **settings
    )
    blocks = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
    assert stage.notes["changed_share"] == round(416 * 64 / (416 * 64 + blocks), 4)


@pytest.mark.parametrize(("word", "settings"), [("prune.magnitude", {}), ("prune.wanda", FEW)])
def test_a_sparsity_at_which_nothing_goes_is_refused(word, settings, tiny_llama, tmp_path):
    with pytest.raises(UserError, match=r"sparsity 0\.0: no weight would go"):
        plugin.build({word: {**settings, "sparsity": 0}}).check_base(base_of(tiny_llama))
    if word == "prune.wanda":  # 0.1 % of 128 inputs of an output is none
        with pytest.raises(UserError, match=r"sparsity 0\.001: no weight went"):
            apply(word, base_of(tiny_llama), tmp_path / "s", **settings, sparsity=0.001)


def test_scales_that_are_no_numbers_are_refused_by_name(tiny_llama, tmp_path):
    """A single weight without a value makes the scale of its block none, and bitsandbytes writes it."""
    folder = reshaped(tiny_llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "s").mkdir()
    step = plugin.build({"quantize.bnb": {"double_quant": False}})
    with pytest.raises(
        LlmqError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight\.absmax holds values that are no"
    ):
        pipeline.applied(step, base_of(folder), tmp_path / "s", CPU)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.safetensors"])
def test_an_adapter_and_a_network_are_looked_through(name, tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "ints": torch.arange(3), "b": torch.ones(4)}
    save_file(tensors, tmp_path / name)
    sound.check_finite(tmp_path)
    save_file({**tensors, "b": torch.tensor([1.0, float("nan")])}, tmp_path / name)
    with pytest.raises(LlmqError, match=r"^b was made with values that are not finite"):
        sound.check_finite(tmp_path)


def test_a_step_that_trains_need_not_tell_a_share(tiny_llama, tmp_path):
    sound.check("adapt.lora", replace(base_of(tiny_llama), notes={}), tmp_path)
