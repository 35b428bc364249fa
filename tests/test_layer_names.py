"""How a recipe names layers: `modules` and `skip_modules` by patterns, LoRA's targets by the ends of names."""

import json
import re

import pytest
from helpers import apply, base_of

from llmq.errors import UserError
from llmq.layers import matches, settings_of
from llmq.text.grids import Grid

BLOCKS = [f"model.layers.{i}.{part}" for i in range(24) for part in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("layers.1", {1}),
        ("layers.1.", {1}),
        (r"layers\.1\.", {1}),
        ("layers.1.*", {1}),
        ("layers.1.*down_proj", {1}),
        (".1.", {1}),
        ("^model.layers.2$|layers.11", {11}),
        ("layers.(1|12).mlp", {1, 12}),
        ("layers.1|layers.13", {1, 13}),
        ("layers.1[0-3]", {10, 11, 12, 13}),
        ("layers.[0-3].", {0, 1, 2, 3}),
        (r"layers.\d.mlp", set(range(10))),
        (r"layers.1\d", set(range(10, 20))),
        (r"layers.\d+", set(range(24))),
        ("layers.+down_proj", set(range(24))),
        ("down_proj", set(range(24))),
        ("self", set(range(24))),
        ("down.proj", set()),
        ("layers.24", set()),
    ],
)
def test_a_dot_is_a_dot_and_a_number_is_whole(pattern, blocks):
    found = {int(re.findall(r"\d+", name)[0]) for name in BLOCKS if matches(pattern, name)}
    assert found == blocks


def test_one_block_keeps_its_own_grid_among_many():
    settings = settings_of(BLOCKS, None, Grid(bits=4), {"layers.1.": Grid(bits=8), "layers.2": "skip"})
    assert [name for name, grid in settings.items() if grid.bits == 8] == BLOCKS[2:4]
    assert BLOCKS[4] not in settings
    assert BLOCKS[40] in settings
    with pytest.raises(UserError, match=r"modules: no layer's name matches 'layers\.99\.'"):
        settings_of(BLOCKS, None, Grid(), {"layers.99.": "skip"})


def test_bitsandbytes_leaves_the_named_layers_alone_and_refuses_a_name_of_none(tiny_llama, tmp_path):
    made = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", skip_modules=["layers.1.mlp", "k_proj"])
    with made.open("cpu") as loaded:
        kinds = {n: type(m).__name__ for n, m in loaded.module.named_modules() if n.endswith("_proj")}
    floats = {name for name, kind in kinds.items() if kind == "Linear"}
    assert floats == {n for n in kinds if n.startswith("model.layers.1.mlp") or n.endswith("k_proj")}
    skipped = json.loads((made.weights / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in skipped
    with pytest.raises(UserError, match=r"skip_modules: no layer's name matches 'k_prj'; did you mean 'k_proj'\?"):
        apply("quantize.bnb", base_of(tiny_llama), tmp_path / "r", skip_modules=["down_proj", "k_prj"])


@pytest.mark.parametrize("setting", ["target_modules", "modules_to_save"])
def test_lora_refuses_the_one_name_among_many_that_no_module_has(setting, tiny_llama, tiny_jsonl, tmp_path):
    settings = {setting: ["q_proj", "v_prj"], "data": str(tiny_jsonl), "max_steps": 1}
    with pytest.raises(UserError, match=rf"{setting} \['q_proj', 'v_prj'\]: no module's name ends with 'v_prj'; did"):
        apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", **settings)


@pytest.mark.parametrize("before", [("quantize.bnb", {}), ("quantize.rtn", {"bits": 4, "group_size": 32})], ids=str)
def test_lora_trains_no_packed_weights_whole(before, tiny_llama, tiny_jsonl, tmp_path):
    word, how = before
    stage = apply(word, base_of(tiny_llama), tmp_path / "q", **how)
    settings = {"modules_to_save": ["lm_head", "mlp"], "data": str(tiny_jsonl), "max_steps": 1}
    with pytest.raises(
        UserError, match=r"'mlp'\]: the weights of model.layers.0.mlp are packed, and cannot be trained"
    ):
        apply("adapt.lora", stage, tmp_path / "a", **settings)
