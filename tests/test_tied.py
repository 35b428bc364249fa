"""Head and embeddings that are one matrix: what the files hold decides, and a change to one of them makes them two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapted_by_chance, apply, base_of, logits_of, some_ids
from safetensors.torch import load_file, save_file

IDS = some_ids()
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied_llama(tiny_llama, tmp_path_factory) -> Path:
    """The tiny model with one matrix for head and embeddings."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(3)
    module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True))
    module.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    assert HEAD not in load_file(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def wrongly_tied(tied_llama, tmp_path_factory) -> Path:
    """A folder that calls head and embeddings tied and stores two matrices that differ."""
    folder = copied(tied_llama, tmp_path_factory.mktemp("wrong") / "model")
    tensors = load_file(folder / "model.safetensors")
    own = torch.randn(tensors[EMBEDDINGS].shape, generator=torch.Generator().manual_seed(9)) * 0.05
    save_file({**tensors, HEAD: own}, folder / "model.safetensors", {"format": "pt"})
    return folder


def copied(folder: Path, target: Path) -> Path:
    """A copy of a model folder."""
    import shutil

    return Path(shutil.copytree(folder, target))


def adapted(folder: Path, target: Path, **settings: Any) -> Any:
    """The model in a folder with an adapter whose every weight is random, as if it had been trained."""
    return adapted_by_chance(base_of(folder, "float32"), target, **settings)


def in_plain_transformers(folder: Path) -> torch.Tensor:
    """The logits of a folder that lacks nothing and holds nothing that is not read."""
    from transformers import AutoModelForCausalLM

    module, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), said
    return logits_of(module.eval(), IDS)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "head, DoRA": {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_merging_an_adapter_on_one_of_two_tied_matrices_makes_them_two(name, tied_llama, tmp_path):
    with_adapter = adapted(tied_llama, tmp_path / "a", **ADAPTERS[name])
    with with_adapter.open("cpu") as loaded:
        expected = logits_of(loaded.module, IDS)
    merged = apply("adapt.merge", with_adapter, tmp_path / "m", window=32, tokens=256)
    assert json.loads((merged.weights / "config.json").read_text())["tie_word_embeddings"] is False
    after = stored(merged.weights)
    assert not torch.equal(after[HEAD], after[EMBEDDINGS])
    torch.testing.assert_close(in_plain_transformers(merged.weights), expected, rtol=1e-4, atol=1e-4)
    lost = {m.metric: m.value for m in merged.measurements}
    assert lost["kl_divergence"] < 1e-6
    assert lost["top1_agreement"] == 1


def test_what_no_adapter_touches_stays_tied(tied_llama, tmp_path):
    merged = apply("adapt.merge", adapted(tied_llama, tmp_path / "a", target_modules=["q_proj"]), tmp_path / "m")
    assert HEAD not in stored(merged.weights)
    assert json.loads((merged.weights / "config.json").read_text())["tie_word_embeddings"] is True


PRUNED = {"modules": {"lm_head": {"sparsity": 0.5}}}
STEPS: dict[str, dict[str, Any]] = {
    "prune.magnitude": PRUNED,
    "prune.wanda": {**PRUNED, "samples": 2, "length": 16},
    "quantize.rtn": {"group_size": 32, "modules": {"lm_head": {"bits": 8}}},
    "quantize.gptq": {"group_size": 32, "modules": {"lm_head": {"bits": 8}}, "samples": 2, "length": 16},
}


def head_of(stage: Any) -> torch.Tensor:
    """The head's matrix as it multiplies."""
    with stage.open("cpu") as loaded:
        return loaded.module.get_output_embeddings().weight.detach().float().clone()


@pytest.mark.slow
@pytest.mark.parametrize("word", STEPS)
@pytest.mark.parametrize("kind", ["tied", "wrongly tied", "only the head is stored"])
def test_a_changed_head_is_made_from_the_stored_one_and_the_embeddings_stay(
    word, kind, tied_llama, wrongly_tied, tmp_path
):
    folder = wrongly_tied if kind == "wrongly tied" else tied_llama
    if kind == "only the head is stored":
        folder = copied(tied_llama, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        tensors[HEAD] = tensors.pop(EMBEDDINGS)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    before = stored(folder)
    embeddings = before.get(EMBEDDINGS, before.get(HEAD))
    head = before.get(HEAD, before.get(EMBEDDINGS))
    stage = apply(word, base_of(folder, "float32"), tmp_path / "s", **STEPS[word])
    after = stored(stage.weights)
    assert json.loads((stage.weights / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(after[EMBEDDINGS], embeddings)
    made = head_of(stage)
    if word.startswith("prune"):
        assert (made == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
        assert torch.equal(made, head.where(made != 0, 0))
        with stage.open("cpu") as loaded:
            assert torch.equal(in_plain_transformers(stage.weights), logits_of(loaded.module, IDS))
    else:
        assert ((made - head).norm() / head.norm()).item() < 0.02, "8 bits a weight lose about half a percent"


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_leaves_two_stored_matrices_two(bits, wrongly_tied, tmp_path):
    stage = apply("quantize.bnb", base_of(wrongly_tied, "float32"), tmp_path / "q", bits=bits)
    assert json.loads((stage.weights / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = stored(wrongly_tied), stored(stage.weights)
    assert torch.equal(after[HEAD], before[HEAD])
    assert torch.equal(after[EMBEDDINGS], before[EMBEDDINGS])


def test_an_untouched_head_is_written_as_it_was(tied_llama, wrongly_tied, tmp_path):
    tied = apply("quantize.rtn", base_of(tied_llama, "float32"), tmp_path / "t", group_size=32)
    assert json.loads((tied.weights / "config.json").read_text())["tie_word_embeddings"] is True
    apart = apply("prune.magnitude", base_of(wrongly_tied, "float32"), tmp_path / "w")
    assert json.loads((apart.weights / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(head_of(apart), stored(wrongly_tied)[HEAD])


@pytest.mark.parametrize("kind", ["tied", "wrongly tied"])
def test_one_matrix_counts_once_and_two_count_twice(kind, tied_llama, wrongly_tied):
    from llmq.tasks.size import Size

    folder = tied_llama if kind == "tied" else wrongly_tied
    with base_of(folder, "float32").open("cpu") as loaded:
        counted = {m.metric: m.value for m in Size().score(loaded)}
    in_files = sum(t.numel() for t in stored(folder).values())
    assert counted["parameters"] == in_files
