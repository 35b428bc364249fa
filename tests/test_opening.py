"""What files hold is what is opened: tensors dropped, renamed, transposed, added or of whole numbers are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, apply, base_of, logits_of, some_ids
from safetensors.torch import load_file, save_file
from tiny_text_models import build

from llmq import plugin
from llmq.errors import UserError
from llmq.guarded.weights import safetensors_of
from llmq.text import opening, weights

Tensors = dict[str, torch.Tensor]


def dropped(tensors: Tensors, name: str) -> None:
    """One tensor less."""
    del tensors[name]


def renamed(tensors: Tensors, name: str) -> None:
    """A tensor under a name that no network has."""
    tensors[f"other.{name}"] = tensors.pop(name)


def transposed(tensors: Tensors, name: str) -> None:
    """Rows for columns; a vector gets one entry more."""
    tensor = tensors[name]
    tensors[name] = tensor.t().contiguous() if tensor.ndim == 2 else torch.cat([tensor, tensor[:1]])


def added(tensors: Tensors, name: str) -> None:
    """A tensor that nothing needs."""
    tensors[f"{name}.more"] = tensors[name].clone()


def whole(tensors: Tensors, name: str) -> None:
    """Whole numbers in place of weights."""
    tensors[name] = tensors[name].to(torch.int32)


CHANGES = [dropped, renamed, transposed, added, whole]


def changed(folder: Path, target: Path, change: Callable[[Tensors, str], None], name: str) -> Path:
    """A copy of a folder whose one tensor was changed."""
    shutil.copytree(folder, target)
    (file,) = (f for f in safetensors_of(target) if name in load_file(f))
    tensors = load_file(file)
    change(tensors, name)
    save_file(tensors, file, {"format": "pt"})
    return target


def refused(open_it: Callable[[], object], name: str) -> None:
    """One line with the name of the tensor, or of what it was made into."""
    with pytest.raises(UserError) as said:
        open_it()
    line = str(said.value)
    assert "\n" not in line
    assert name in line, line


LLAMA = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_lacks_or_has_more_is_refused_by_every_way_to_open_it(tiny_llama, tmp_path, change, name):
    folder = changed(tiny_llama, tmp_path / "m", change, name)
    base = base_of(folder)
    refused(lambda: base.model.open(base, "cpu"), name)
    refused(lambda: base.model.skeleton(base, "cpu"), name)
    refused(lambda: apply("quantize.bnb", base, tmp_path / "q"), name)
    refused(lambda: apply("quantize.rtn", base, tmp_path / "r", group_size=32), name)


@pytest.mark.parametrize("change", CHANGES)
def test_shards_are_compared_as_one_file_is(tiny_llama, tmp_path, change):
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_llama, tmp_path / "s", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "s", max_shard_size="100KB")
    assert len(safetensors_of(tmp_path / "s")) > 1
    base_of(tmp_path / "s").open("cpu")
    base = base_of(changed(tmp_path / "s", tmp_path / "m", change, LLAMA[0]))
    refused(lambda: base.model.open(base, "cpu"), LLAMA[0])


@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_are_stored_apart_are_compared(tiny_llama, tmp_path, change):
    build("mixtral", tmp_path / "moe", tiny_llama)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    base = base_of(changed(tmp_path / "moe", tmp_path / "m", change, name), "float32")
    shown = name if change is whole else "experts"  # opened as one, under a name of its own
    refused(lambda: base.model.open(base, "cpu"), shown)
    refused(lambda: base.model.skeleton(base, "cpu"), shown)


PACKED = {
    "gptq": ("quantize.rtn", {"group_size": 32}, ["qweight", "scales", "qzeros"]),
    "bnb4": ("quantize.bnb", {"bits": 4}, ["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"]),
    "bnb8": ("quantize.bnb", {"bits": 8}, ["weight", "SCB"]),
}


@pytest.mark.parametrize("change", [dropped, renamed, transposed, added])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_folders_are_compared(tiny_llama, tmp_path, kind, change):
    word, settings, parts = PACKED[kind]
    stage = apply(word, base_of(tiny_llama), tmp_path / "q", **settings)
    with stage.open("cpu") as loaded:
        assert logits_of(loaded.module, some_ids()).isfinite().all()
    for part in parts:
        name = f"model.layers.1.mlp.down_proj.{part}"
        base = base_of(changed(stage.weights, tmp_path / part, change, name))
        refused(lambda base=base: base.model.open(base, "cpu"), "model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_are_compared(tiny_llama, tiny_jsonl, tmp_path, change):
    settings = {"r": 4, "max_length": 64, "max_steps": 1, "per_device_train_batch_size": 2}
    stage = apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **settings)
    assert stage.adapter
    file = stage.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "down_proj.lora_A" in n)
    change(tensors, name)
    save_file(tensors, file, {"format": "pt"})
    refused(lambda: stage.model.open(stage, "cpu"), "down_proj")
    refused(lambda: apply("adapt.merge", stage, tmp_path / "m", window=32, tokens=64), "down_proj")


def test_what_stands_beside_the_single_file_counts_nowhere(tiny_llama, tmp_path):
    """transformers opens `model.safetensors` before an index; so do size, hashes and every step."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_llama, tmp_path / "m")
    torch.manual_seed(7)
    other = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_llama).config)
    other.save_pretrained(tmp_path / "other", max_shard_size="100KB")
    for file in (tmp_path / "other").glob("model*"):
        shutil.copy(file, tmp_path / "m" / file.name)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    both, one = base_of(tmp_path / "m"), base_of(tiny_llama)
    assert [f.name for f in both.weight_files()] == ["model.safetensors"]
    for word, settings in (("quantize.rtn", {"group_size": 32}), ("prune.magnitude", {"sparsity": 0.5})):
        stages = [apply(word, base, tmp_path / f"{word}-{i}", **settings) for i, base in enumerate((both, one))]
        first, second = ({f.name: f.read_bytes() for f in stage.weight_files()} for stage in stages)
        assert first == second
        assert not [
            f for f in stages[0].weights.glob("model*") if f not in stages[0].weight_files() and f.suffix != ".json"
        ]


@pytest.mark.parametrize("named", ["other.safetensors", "other.safetensors.index.json"])
def test_the_file_that_a_configuration_names_goes_first(tiny_llama, tmp_path, named):
    """As transformers does it (`transformers_weights`): opened, counted, hashed, changed; and copied to nobody."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_llama, tmp_path / "m")
    torch.manual_seed(7)
    other = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_llama).config)
    other.save_pretrained(tmp_path / "other", max_shard_size="100KB" if named.endswith("json") else "1GB")
    for file in (tmp_path / "other").glob("model*"):
        shutil.copy(file, tmp_path / "m" / file.name.replace("model.safetensors", "other.safetensors"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    weights.check_weights(str(tmp_path / "m"))
    both = base_of(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert (tmp_path / "m" / "model.safetensors") not in both.weight_files()
    with both.open("cpu") as loaded:
        assert torch.equal(logits_of(loaded.module, some_ids()), logits_of(plain.eval(), some_ids()))
    stage = apply("prune.magnitude", both, tmp_path / "p", sparsity=0.5)
    with stage.open("cpu") as loaded:
        head = plain.get_output_embeddings().weight
        assert torch.equal(loaded.module.get_output_embeddings().weight, head)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("weights.bin", r"is no \*.safetensors"),
        (7, r"is no \*.safetensors"),
        ("../m.safetensors", "lies outside the folder"),
        ("gone.safetensors", "is not there"),
    ],
)
def test_a_file_that_cannot_be_the_weights_is_refused(tiny_llama, tmp_path, name, says):
    shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(UserError, match=f"transformers_weights {name!r} {says}"):
        weights.check_weights(str(tmp_path / "m"))


def test_headers_are_read_once_to_be_compared(tiny_llama, tmp_path, monkeypatch):
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "q", bits=4, group_size=32)
    read: list[Path] = []
    stock = opening.stored_as

    def counted(files: list[Path]) -> Any:
        read.extend(files)
        return stock(files)

    monkeypatch.setattr(opening, "stored_as", counted)
    with stage.open("cpu"):
        assert read == stage.weight_files()


# GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(folder: Path, tokenizer: Path, change: Callable[[dict[str, np.ndarray]], None], parts: int = 1) -> Path:
    """A random Llama of one block as GGUF of float32, in one file or several."""
    from gguf import GGUFWriter, TokenType

    rng = np.random.default_rng(0)
    words = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    tokens = [token for token, _ in sorted(words["vocab"].items(), key=lambda kv: kv[1])]
    shapes = {"token_embd": (len(tokens), 64), "output": (len(tokens), 64), "output_norm": (64,)}
    block = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    block |= {"ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128), "attn_norm": (64,), "ffn_norm": (64,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    tensors = {f"{n}.weight": rng.standard_normal(s).astype(np.float32) / 8 for n, s in shapes.items()}
    change(tensors)
    names = list(tensors)
    count = -(-len(names) // parts)
    folder.mkdir(exist_ok=True)
    for i in range(parts):
        name = "m.gguf" if parts == 1 else f"m-{i + 1:05}-of-{parts:05}.gguf"
        writer = GGUFWriter(folder / name, "llama")
        if i == 0:
            writer.add_context_length(256)
            writer.add_embedding_length(64)
            writer.add_block_count(1)
            writer.add_feed_forward_length(128)
            writer.add_head_count(4)
            writer.add_head_count_kv(2)
            writer.add_rope_dimension_count(16)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_vocab_size(len(tokens))
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(tokens)
            writer.add_token_types([TokenType.NORMAL] * len(tokens))
            merges = [m if isinstance(m, str) else " ".join(m) for m in words["merges"]]
            writer.add_token_merges(merges)
            writer.add_eos_token_id(2)
            writer.add_bos_token_id(2)
        if parts > 1:
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(names))
        for tensor in names[i * count : (i + 1) * count]:
            writer.add_tensor(tensor, tensors[tensor])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / ("m.gguf" if parts == 1 else f"m-00001-of-{parts:05}.gguf")


def test_a_gguf_file_is_foretold_and_converted_in_one_parse(tiny_llama, tmp_path, monkeypatch):
    import gguf

    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, *given: object):
            parsed.append(given)
            super().__init__(*given)

    file = write_gguf(tmp_path / "one", tiny_llama, lambda t: None)
    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    model = plugin.build({"causal_lm": {"weights": str(file), "dtype": "float32"}}, "models")
    assert model.foresee_base().seconds > 0
    parsed.clear()
    model.base(CPU)
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counted
    assert model.foresee_base().seconds == 0


def test_a_split_gguf_file_is_read_whole_whichever_part_is_named(tiny_llama, tmp_path):
    single = base_of(write_gguf(tmp_path / "one", tiny_llama, lambda t: None), "float32")
    first = write_gguf(tmp_path / "three", tiny_llama, lambda t: None, parts=3)
    with single.open("cpu") as loaded:
        wanted = logits_of(loaded.module, some_ids())
    for part in weights.parts_of(first):
        with base_of(part, "float32").open("cpu") as loaded:
            assert torch.equal(logits_of(loaded.module, some_ids()), wanted)


def test_a_part_that_is_not_there_is_named(tiny_llama, tmp_path):
    first = write_gguf(tmp_path / "three", tiny_llama, lambda t: None, parts=3)
    first.with_name("m-00002-of-00003.gguf").unlink()
    refused(lambda: base_of(first), "m-00002-of-00003.gguf")


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "output_norm.weight", "token_embd.weight"])
@pytest.mark.parametrize("change", ["drop", "rename", "transpose", "add"])
def test_a_gguf_file_that_lacks_or_has_more_is_refused(tiny_llama, tmp_path, change, name):
    def amiss(tensors: dict[str, np.ndarray]) -> None:
        if change in ("drop", "rename"):
            taken = tensors.pop(name)
        if change == "rename":
            tensors[f"other.{name}"] = taken
        if change == "transpose":
            whole = tensors[name]
            tensors[name] = np.ascontiguousarray(whole.T) if whole.ndim == 2 else np.concatenate([whole, whole[:1]])
        if change == "add":
            tensors["blk.0.other.weight"] = tensors[name]

    file = write_gguf(tmp_path / "g", tiny_llama, amiss)
    refused(lambda: base_of(file, "float32"), "m.gguf")
