"""Folders and files of weights that were damaged or crafted: `llmq eval`, which opens them and asks two questions."""

import atexit
import functools
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torture import mutate
from torture.child import command, judge
from torture.child import warm as warm

KINDS = ("llama", "gpt2", "sharded", "nf4", "int8", "gptq", "lora", "gguf", "srcnn")
SUITE = "- size\n- perplexity: {data: d.jsonl, part: all, limit: 1, window: 16}\n"
VISION = "- size\n"
SHAPE: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@functools.cache
def templates() -> Path:
    """The folder of all tiny models; the process that asks first removes it in the end."""
    folder = Path(tempfile.mkdtemp(prefix="llmq-torture-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder) if os.getpid() == owner else None)
    return folder


def copy_of(kind: str, target: Path) -> Path:
    """A fresh copy of a tiny model of a kind."""
    made = whole(kind)
    return Path(shutil.copytree(made, target) if made.is_dir() else shutil.copyfile(made, target))


@functools.cache
def whole(kind: str) -> Path:
    """A tiny model of a kind that nothing is wrong with, made when first needed."""
    # A stage and its base lie apart: beside one another they would be taken for stages of one run.
    made = templates() / kind / (f"{kind}.gguf" if kind == "gguf" else kind)
    made.parent.mkdir()
    makers = {"gguf": _gguf, "srcnn": _srcnn, "llama": _language, "gpt2": _language, "sharded": _language}
    makers.get(kind, _step)(kind, made)
    return made


def _language(kind: str, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    ends: Any = {"bos_token_id": None, "eos_token_id": 256}
    if kind == "gpt2":
        network: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=257, n_positions=64, n_embd=64, n_layer=1, n_head=2, **ends)
        )
    else:
        network = LlamaForCausalLM(LlamaConfig(**SHAPE, **ends)).to(torch.bfloat16)
    network.save_pretrained(folder, **({"max_shard_size": "40KB"} if kind == "sharded" else {}))
    words.save_pretrained(folder)


def _step(kind: str, folder: Path) -> None:
    """A stage: what a step makes of the whole model, with the `artifact.json` that says how to open it."""
    from llmq import plugin
    from llmq.types import Context

    settings: dict[str, Any] = {
        "nf4": {"quantize.bnb": {"bits": 4, "double_quant": True}},
        "int8": {"quantize.bnb": {"bits": 8}},
        "gptq": {"quantize.rtn": {"group_size": 32}},
        "lora": {"adapt.lora": {"data": {"file": {"path": str(_rows())}}, "r": 2, "max_steps": 1, "max_length": 32}},
    }[kind]
    model: Any = plugin.build({"causal_lm": {"weights": str(whole("llama"))}}, "models")
    context = Context("cpu", 0)
    folder.mkdir()
    step: Any = plugin.build(settings)
    step.apply(model.base(context), folder, context).save(folder)


def _rows() -> Path:
    file = templates() / "d.jsonl"
    file.write_text('{"text": "one two three four five"}\n' * 3)
    return file


def _gguf(kind: str, file: Path) -> None:
    """A Llama as llama.cpp's own converter lays it out, in float32."""
    import numpy as np
    from gguf import GGUFWriter

    dice = np.random.default_rng(0)
    letters = json.loads((whole("llama") / "tokenizer.json").read_text())["model"]["vocab"]
    writer = GGUFWriter(file, "llama")
    for name, value in (("context_length", 64), ("embedding_length", 64), ("block_count", 1), ("head_count", 2)):
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count_kv(1)
    writer.add_feed_forward_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(258)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "ab"])
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    shapes = {
        "token_embd": (258, 64), "output": (258, 64), "output_norm": (64,), "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (64, 64), "blk.0.ffn_up": (64, 64), "blk.0.ffn_down": (64, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", dice.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _srcnn(kind: str, folder: Path) -> None:
    from llmq import plugin
    from llmq.types import Context
    from llmq.vision.state import save_network

    folder.mkdir()
    model: Any = plugin.build("srcnn", "models")
    with model.base(Context("cpu", 0)).open("cpu") as loaded:
        save_network(loaded.module, folder)


def once(seed: int, folder: Path) -> str:
    """One model with something wrong, evaluated as the command does."""
    dice = random.Random(f"checkpoints {seed}")
    kind = dice.choice(KINDS)
    model = copy_of(kind, folder / ("m.gguf" if kind == "gguf" else "m"))
    _damage(model, dice)
    (folder / "d.jsonl").write_text('{"text": "one two three four five six"}\n')
    (folder / "s.yaml").write_text(VISION if kind == "srcnn" else SUITE)
    family = ["--model", "srcnn"] if kind == "srcnn" else []
    argv = ["eval", model.name, "--suite", "s.yaml", "--out", "o", "--no-cache", *family]
    return judge(command(argv, folder), seed, allowed=(0, 2, 4))


def _damage(model: Path, dice: random.Random) -> None:
    files = [model] if model.is_file() else sorted(f for f in model.rglob("*") if f.is_file())
    told = [f for f in files if f.suffix == ".json" and f.name != "tokenizer.json"]
    for _ in range(dice.choice([1, 1, 2])):
        file = dice.choice(told if told and dice.random() < 0.5 else files)
        if not file.is_file() or file.is_symlink():
            continue
        content = file.read_bytes()
        if dice.random() < 0.06:
            mutate.of_file(file, dice)
        elif file.suffix == ".json":
            file.write_bytes(_changed(content, dice))
        elif file.suffix == ".safetensors" and dice.random() < 0.5:
            file.write_bytes(_header(content, dice))
        else:
            file.write_bytes(
                mutate.of_flips(content, dice, 2000) if dice.random() < 0.7 else mutate.of_bytes(content, dice)
            )


def _changed(content: bytes, dice: random.Random) -> bytes:
    try:
        return mutate.of_json(content, dice)
    except ValueError:  # it was changed before
        return mutate.of_bytes(content, dice)


def _header(content: bytes, dice: random.Random) -> bytes:
    """A safetensors file whose header says something else; its tensors stay where they are."""
    length = int.from_bytes(content[:8], "little")
    try:
        told = _changed(content[8 : 8 + length], dice)
    except ValueError:
        return mutate.of_flips(content, dice, 2000)
    return len(told).to_bytes(8, "little") + told + content[8 + length :]
