"""Adapters that pool their inputs by group: they fold into the zero points of the grid, and on into Q4_1."""

import pytest
import torch
from helpers import adapter_bytes, apply, base_of, logits_of, some_ids
from safetensors.torch import load

from llmq import plugin
from llmq.errors import UserError
from llmq.matrix.gguf_blocks import carried
from llmq.matrix.grid import round_to_nearest
from llmq.text.pooled import folded, on_grid

QUICK = {"r": 4, "max_length": 64, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pools", [1, 2, 4])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_change_of_each_pool_folds_into_zero_points_that_blocks_of_gguf_hold(pools, bits):
    generator = torch.Generator().manual_seed(0)
    grid = round_to_nearest(torch.randn(24, 128, generator=generator), bits, 32, False)
    change = 0.1 * torch.randn(pools, 24, generator=generator)
    made = folded(grid, change)
    expected = grid.weight() + change.repeat_interleave(128 // pools, 0).t()
    # The least weight of a group is rounded to float16.
    assert (made.weight() - expected).abs().max() < 2**-11 * (made.zeros * made.scales).abs().max() + 1e-6
    blocks = carried(made, "Q4_1")
    assert blocks
    assert blocks.distance < 1e-5
    tensors = {"scales": made.scales, "zeros": made.zeros, "g_idx": made.g_idx, "bits": torch.tensor(bits)}
    assert torch.equal(on_grid(made.weight().bfloat16(), tensors).codes, made.codes)


def test_groups_that_lie_in_several_pools_do_not_fold():
    grid = round_to_nearest(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)), 4, 64, False)
    with pytest.raises(UserError, match="several pools"):
        folded(grid, torch.zeros(4, 8))


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    settings = {"bits": 4, "group_size": 32, "sym": False}
    return apply("quantize.rtn", base_of(tiny_llama, "float32"), tmp_path_factory.mktemp("packed") / "1", **settings)


@pytest.mark.slow
def test_an_adapter_merges_into_the_grid_and_goes_into_gguf_without_loss(packed, tiny_jsonl, tmp_path):
    adapted = apply("adapt.lora", packed, tmp_path / "a", data=str(tiny_jsonl), use_qalora=True, **QUICK)
    tensors = load(adapter_bytes(adapted))
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[1] == 2  # groups
    assert all(t.any() for name, t in tensors.items() if "lora_B" in name)
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=256)
    divergence = next(m for m in merged.measurements if m.metric == "kl_divergence")
    assert divergence.value <= 1e-4
    with adapted.open("cpu") as a, merged.open("cpu") as b, packed.open("cpu") as c:
        one, other, before = (logits_of(x.module, some_ids()) for x in (a, b, c))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert (one - before).abs().max() > 10 * (one - other).abs().max()
    (tmp_path / "g").mkdir()
    exported = apply("export.gguf", merged, tmp_path / "g")
    assert exported.notes["types"]["Q4_1"] > 0
    assert exported.notes["grids_kept"] == 14
    assert "OpenVINO GenAI rounds" in exported.notes["zero_points"]
    assert exported.notes["largest_distance_to_grid"] < 1e-5
    with merged.open("cpu") as a, exported.open("cpu") as b:
        torch.testing.assert_close(
            logits_of(a.module, some_ids()), logits_of(b.module, some_ids()), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"qalora_group_size": 32}, "qalora_group_size has no effect without use_qalora"),
        ({"use_qalora": True, "use_dora": True}, "use_qalora and use_dora exclude each other"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        plugin.build({"adapt.lora": {"data": "pydoc", **settings}}).check()


@pytest.mark.parametrize(
    ("packs", "settings", "said"),
    [
        (False, {}, "this stage has none"),
        (True, {"qalora_group_size": 48}, "no multiple of the groups of 32 inputs"),
        (True, {"target_modules": ["lm_head"]}, "lm_head is not packed"),
    ],
)
def test_a_base_without_such_groups_is_refused(packs, settings, said, packed, tiny_llama, tiny_jsonl, tmp_path):
    base = packed if packs else base_of(tiny_llama)
    with pytest.raises(UserError, match=said):
        apply("adapt.lora", base, tmp_path, data=str(tiny_jsonl), use_qalora=True, **QUICK, **settings)
