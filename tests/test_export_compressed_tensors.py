"""What `export.compressed_tensors` writes is opened by transformers and by llmq to the logits of the stage before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_text_models
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from helpers import apply, base_of, logits_of, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.matrix import pack_quantized
from llmq.matrix.grid import Quantized
from llmq.text import compressed, weights

pytestmark = pytest.mark.usefixtures("one_thread")
CASES: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 32},
    "8 bits, whole rows": {"bits": 8, "group_size": -1},
    "lopsided": {"bits": 4, "group_size": 32, "sym": False},
    "by layer": {
        "bits": 4,
        "group_size": 32,
        "modules": {"down_proj": {"bits": 8, "group_size": -1}, "lm_head": {"bits": 8}, "q_proj": "skip"},
    },
}
FEW = {"samples": 4, "length": 32}
EXACT = 5e-5
"""In float32; what is left is the order of sums."""


def packed(folder: Path, target: Path, dtype: str = "float32", word: str = "quantize.rtn", **its: Any) -> Artifact:
    return apply(word, base_of(folder, dtype), target, **its)


def logits(artifact: Artifact) -> torch.Tensor:
    with artifact.open("cpu") as loaded:
        return logits_of(loaded.module, some_ids())


@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_it_to_our_logits(tiny_llama, tmp_path, case):
    stage = packed(tiny_llama, tmp_path / "q", **CASES[case])
    made = apply("export.compressed_tensors", stage, tmp_path / "made")
    assert (made.runtime, made.packed) == ("torch", True)
    assert made.bytes_on_disk < 1.05 * stage.bytes_on_disk
    assert made.stored == stage.stored
    assert " bits in groups of " in made.stored
    truth = logits(stage)
    assert torch.equal(logits(made), truth)
    # compressed-tensors 0.20 has no place for packed zero points before it dequantizes.
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if case == "lopsided" else {}
    theirs = AutoModelForCausalLM.from_pretrained(made.weights, dtype="float32", **how).eval()
    assert how or any(name.endswith("weight_packed") for name in theirs.state_dict())
    torch.testing.assert_close(logits_of(theirs, some_ids()), truth, atol=EXACT, rtol=EXACT)


def test_in_bfloat16_it_stays_as_near_as_its_scales_allow(tiny_llama, tmp_path):
    stage = packed(tiny_llama, tmp_path / "q", "bfloat16", bits=4, group_size=32)
    made = apply("export.compressed_tensors", stage, tmp_path / "made")
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(made.weights).eval(), some_ids()).float()
    truth = logits(stage).float()
    assert torch.equal(logits(made).float(), truth)
    assert float((theirs - truth).norm() / truth.norm()) < 0.02


def test_its_configuration_says_which_layers_are_packed(tiny_llama, tmp_path):
    stage = packed(tiny_llama, tmp_path / "q", **CASES["by layer"])
    made = apply("export.compressed_tensors", stage, tmp_path / "made")
    said = json.loads((made.weights / "config.json").read_text())["quantization_config"]
    groups = said["config_groups"].values()
    assert {(g["weights"]["num_bits"], g["weights"]["symmetric"], g["weights"]["strategy"]) for g in groups} == {
        (4, True, "group"),
        (8, True, "channel"),
        (8, True, "group"),
    }
    assert said["ignore"] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert (
        "model.layers.0.self_attn.q_proj is packed otherwise than the layers that vLLM fuses" in made.notes["finding"]
    )
    assert not (made.weights / "quantize_config.json").exists()


def test_such_a_folder_of_anybody_is_a_model(tiny_llama, tmp_path):
    stage = packed(tiny_llama, tmp_path / "q", bits=4, group_size=32)
    made = apply("export.compressed_tensors", stage, tmp_path / "made")
    assert "finding" not in made.notes
    weights.check_weights(str(made.weights))
    base = base_of(made.weights, "float32")
    assert base.packed
    assert torch.equal(logits(base), logits(stage))


def test_gptq_keeps_its_grid_and_a_stage_in_one_file_is_read(tiny_llama, tmp_path, tiny_jsonl):
    data = {"data": {"file": {"path": str(tiny_jsonl)}}, **FEW}
    stage = packed(tiny_llama, tmp_path / "q", word="quantize.gptq", bits=4, group_size=32, **data)
    tensors = {n: t for f in sorted(stage.weights.glob("*.safetensors")) for n, t in load_file(f).items()}
    for file in stage.weights.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, stage.weights / "model.safetensors", {"format": "pt"})
    made = apply("export.compressed_tensors", stage, tmp_path / "made")
    assert [f.name for f in made.weight_files()] == ["model.safetensors"]
    assert torch.equal(logits(made), logits(stage))


def test_what_has_no_place_is_refused_with_the_cure(tiny_llama, tmp_path, tiny_jsonl):
    three = packed(tiny_llama, tmp_path / "3", bits=3, group_size=32)
    with pytest.raises(UserError, match=r"has 3 bits, and vLLM reads .* 4 and 8; quantize it with bits: 4"):
        apply("export.compressed_tensors", three, tmp_path / "a")
    data = {"data": {"file": {"path": str(tiny_jsonl)}}, **FEW}
    ordered = packed(tiny_llama, tmp_path / "o", word="quantize.gptq", group_size=32, static_groups=False, **data)
    with pytest.raises(UserError, match=r"order of its activations, .* static_groups: true"):
        apply("export.compressed_tensors", ordered, tmp_path / "b")
    nf4 = packed(tiny_llama, tmp_path / "n", word="quantize.bnb")
    with pytest.raises(UserError, match=r"is packed by bitsandbytes; what quantize.gptq, rtn and awq write"):
        apply("export.compressed_tensors", nf4, tmp_path / "c")


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_experts_and_turned_matrices_are_refused_by_name(tiny_llama, tmp_path, architecture):
    folder = tiny_text_models.build(architecture, tmp_path / "m", tiny_llama)
    stage = packed(folder, tmp_path / "q", bits=4, group_size=32)
    with pytest.raises(
        UserError, match=rf"of {architecture} is no linear layer of transformers, .* modules: {{…: skip}}"
    ):
        apply("export.compressed_tensors", stage, tmp_path / "made")
    assert not list((tmp_path / "made").glob("*.safetensors"))


def test_an_export_that_answers_otherwise_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    stage = packed(tiny_llama, tmp_path / "q", bits=4, group_size=32)
    right = pack_quantized.to_tensors

    def wrong(made: Quantized, symmetric: bool) -> dict[str, torch.Tensor]:
        tensors = right(made, symmetric)
        return {**tensors, "weight_packed": tensors["weight_packed"] ^ 1}

    monkeypatch.setattr(compressed.pack_quantized, "to_tensors", wrong)
    with pytest.raises(LlmqError, match=r"^export.compressed_tensors: the new stage answers otherwise .* of the norm"):
        apply("export.compressed_tensors", stage, tmp_path / "made")
    assert not list((tmp_path / "made").glob("*.safetensors"))


Tensors = dict[str, torch.Tensor]
PART = "model.layers.0.mlp.up_proj.weight_"
FAULTS: dict[str, Callable[[Tensors], Any]] = {
    "no scales": lambda t: t.pop(f"{PART}scale"),
    "no shape": lambda t: t.pop(f"{PART}shape"),
    "another shape": lambda t: t[f"{PART}shape"].add_(1),
    "codes cut": lambda t: t.update({f"{PART}packed": t[f"{PART}packed"][:, 1:].clone()}),
    "groups cut": lambda t: t.update({f"{PART}scale": t[f"{PART}scale"][1:].clone()}),
    "other numbers": lambda t: t.update({f"{PART}packed": t[f"{PART}packed"].float()}),
    "not finite": lambda t: t[f"{PART}scale"].fill_(float("nan")),
    "zeros of another size": lambda t: t.update({f"{PART}zero_point": torch.zeros(3, 3, dtype=torch.int32)}),
    "groups beyond": lambda t: t.update({f"{PART}g_idx": torch.full((64,), 9, dtype=torch.int32)}),
}


@pytest.fixture(scope="module")
def exported(tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    stage = packed(tiny_llama, folder / "q", bits=4, group_size=32)
    return apply("export.compressed_tensors", stage, folder / "made").weights


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_one_line(exported, tmp_path, fault):
    folder = Path(shutil.copytree(exported, tmp_path / "m"))
    file = next(f for f in sorted(folder.glob("*.safetensors")) if f"{PART}packed" in load_file(f))
    tensors = load_file(file)
    FAULTS[fault](tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="whole packed layers") as said, base_of(folder).open("cpu"):
        pass
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "naive-quantized"},
        {"config_groups": {}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
        {"kv_cache_scheme": {"num_bits": 8}},
    ],
)
def test_what_is_more_than_packed_weights_is_refused(exported, tmp_path, change):
    folder = Path(shutil.copytree(exported, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="packed by compressed-tensors, which is not read here"):
        weights.check_weights(str(folder))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from((4, 8)), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1))
def test_packing_is_that_of_the_library_and_its_own_inverse(bits, outputs, groups, symmetric, seed):
    rng = torch.Generator().manual_seed(seed)
    inputs, outputs, top = 32 * groups, 8 * outputs, 2**bits
    codes = torch.randint(top, (inputs, outputs), dtype=torch.uint8, generator=rng)
    zeros = torch.randint(top, (groups, outputs), dtype=torch.int32, generator=rng)
    zeros = torch.full_like(zeros, top // 2) if symmetric else zeros
    order = torch.arange(inputs, dtype=torch.int32) // 32
    made = Quantized(codes, torch.rand(groups, outputs, generator=rng).half(), zeros, order, bits)
    tensors = pack_quantized.to_tensors(made, symmetric)
    signed = (codes.int() - top // 2).to(torch.int8)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(signed.t().contiguous(), bits))
    if not symmetric:
        signed = (zeros - top // 2).to(torch.int8)
        assert torch.equal(tensors["weight_zero_point"], pack_to_int32(signed.t().contiguous(), bits, packed_dim=0))
    back = pack_quantized.to_quantized(tensors)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(back, name).int() if name == "zeros" else getattr(back, name), getattr(made, name))
