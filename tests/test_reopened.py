"""What a step wrote is opened again, and a stage that is another model than was meant is no stage."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import CPU, apply, base_of

from llmq import plugin
from llmq.errors import LlmqError
from llmq.matrix import gptq_format

LORA = {"r": 4, "max_length": 64, "max_steps": 2, "per_device_train_batch_size": 2}
ROCK = {"rock": {"train_slices": 1, "held_out_slices": 1, "size": 48, "scale": 2}}
SMALL = {"edsr": {"scale": 2, "channels": 1, "n_feats": 16, "n_resblocks": 2}}
TRAIN = {"data": ROCK, "max_steps": 1, "crop": 24, "batch_size": 2, "held_out_examples": 0}


@pytest.fixture
def _a_disk_that_changes_a_bit(monkeypatch):
    """The lowest bit of the first tensor of each file is another one than was written."""
    write = safetensors.torch.serialize_file

    def wrong(tensors, file, *args, **kwargs):
        write(tensors, file, *args, **kwargs)
        held = bytearray(Path(file).read_bytes())
        held[8 + int.from_bytes(held[:8], "little")] ^= 1  # behind the header
        Path(file).write_bytes(held)

    monkeypatch.setattr(safetensors.torch, "serialize_file", wrong)


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("quantize.bnb", {"bits": 4}),
        ("quantize.bnb", {"bits": 8}),
        ("quantize.rtn", {"group_size": 32}),
        ("prune.magnitude", {"sparsity": 0.5}),
        ("prune.layers", {"drop": 1, "samples": 2, "length": 32}),
        ("adapt.lora", LORA),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_a_disk_that_changes_a_bit")
def test_a_text_stage_that_is_not_what_was_meant_is_refused(tiny_llama, tiny_jsonl, tmp_path, word, settings):
    more = {"data": str(tiny_jsonl)} if word in ("adapt.lora", "prune.layers") else {}
    with pytest.raises(LlmqError, match="differs"):
        apply(word, base_of(tiny_llama), tmp_path / "stage", **settings, **more)


def test_a_merge_that_is_not_what_was_meant_is_refused(tiny_llama, tiny_jsonl, tmp_path, request):
    adapted = apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **LORA)
    request.getfixturevalue("_a_disk_that_changes_a_bit")
    with pytest.raises(LlmqError, match=r"model.layers.0.input_layernorm.weight differs from the tensor to be written"):
        apply("adapt.merge", adapted, tmp_path / "m", data=str(tiny_jsonl))


@pytest.mark.parametrize(
    ("word", "settings"),
    [("prune.magnitude", {"sparsity": 0.5}), ("prune.channels", {"ratio": 0.5}), ("adapt.train", TRAIN)],
    ids=str,
)
def test_an_image_stage_that_is_not_what_was_meant_is_refused(tmp_path, request, word, settings):
    model = plugin.build(SMALL, "models")
    base = model.base(CPU)
    request.getfixturevalue("_a_disk_that_changes_a_bit")
    with pytest.raises(LlmqError, match="differs from the tensor to be written"):
        apply(word, base, tmp_path / "stage", **settings)


def test_a_configuration_that_changes_the_answers_is_found_where_every_tensor_is_the_same(tiny_llama, tmp_path):
    from llmq.files import write_json
    from llmq.reopened import meant, reopened

    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", bits=4)
    with stage.open("cpu") as loaded:
        what = meant(stage.model, loaded.module)
    config = json.loads((stage.weights / "config.json").read_text())
    write_json(stage.weights / "config.json", {**config, "rms_norm_eps": 0.1})
    with pytest.raises(LlmqError, match=r"its answers are apart by .*, and no tensor is"):
        reopened(what, stage, "cpu")


def test_a_training_that_changes_nothing_is_a_finding(tiny_llama, tiny_jsonl, tmp_path):
    """A rate of 1e-30 moves LoRA's matrix of zeros, and no logit; statistics of batches are learnt at any rate."""
    still = apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **LORA, learning_rate=1e-30)
    moved = apply("adapt.lora", base_of(tiny_llama), tmp_path / "b", data=str(tiny_jsonl), **LORA)
    assert still.notes["finding"] == "training changed nothing: the model answers to the bit as before"
    base = plugin.build({"srresnet": {"scale": 2, "channels": 1, "n_feats": 8, "n_resblocks": 1}}, "models").base(CPU)
    image = apply("adapt.train", base, tmp_path / "c", **TRAIN, learning_rate=1e-30)
    assert re.fullmatch(
        r"training changed nothing: its weights moved by \S+e-\d\d of their norm", image.notes["finding"]
    )
    assert not {"finding"} & {*moved.notes, *apply("adapt.train", base, tmp_path / "d", **TRAIN).notes}


@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
def test_packing_that_loses_a_code_is_found_before_it_is_written(monkeypatch, stored_as):
    from llmq.matrix.grid import round_to_nearest

    made = round_to_nearest(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), 4, 32, True)
    pack = gptq_format.pack
    monkeypatch.setattr(gptq_format, "pack", lambda codes, bits: pack(codes, bits) ^ 1)
    with pytest.raises(LlmqError, match="of 4 bits are others once packed"):
        gptq_format.to_tensors(made, stored_as)


@pytest.mark.parametrize("word", [pytest.param("int8", marks=pytest.mark.slow), "float16"])
def test_a_graph_that_is_not_what_was_meant_is_refused(tmp_path, monkeypatch, word):
    from llmq.openvino_runtime import openvino

    save, base = openvino().save_model, plugin.build(SMALL, "models").base(CPU)

    def wrong(graph, path, **settings):
        save(graph, path, **settings)
        held = bytearray(Path(path).with_suffix(".bin").read_bytes())
        held[len(held) // 2] ^= 1
        Path(path).with_suffix(".bin").write_bytes(held)

    settings = {"data": ROCK, "samples": 2} if word == "int8" else {}
    monkeypatch.setattr(openvino(), "save_model", wrong)
    with pytest.raises(LlmqError, match="differs from the tensor to be written; is the disk sound"):
        apply(f"quantize.{word}", base, tmp_path / "stage", **settings)
