"""Folders that are not read are refused in one line that names what they are and the cure."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, apply, base_of, logits_of, some_ids

from llmq import plugin
from llmq.errors import UserError
from llmq.models import formats


def with_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a folder whose configuration says otherwise; None takes a key away."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    said = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (target / "config.json").write_text(json.dumps(said))
    return target


OTHERS = ["awq", "compressed-tensors", "hqq", "quanto", "aqlm", "torchao", "bitnet", "fp8", "eetq", "higgs", "vptq"]
OTHERS += ["spqr", "mxfp4", "quark", "fbgemm_fp8", "auto-round", "nobody-knows"]


@pytest.mark.parametrize("method", OTHERS)
def test_a_packed_format_that_is_not_read_is_named(tiny_llama, tmp_path, method):
    folder = with_config(tiny_llama, tmp_path / "m", quantization_config={"quant_method": method})
    with pytest.raises(UserError, match=f"packed by '{method}', which is not read here .* float model"):
        base_of(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": None}, "has no 'model_type'"),
        ({"model_type": "lama"}, "'lama', which transformers does not know; did you mean"),
        ({"model_type": "t5"}, "is an encoder-decoder"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "bert"}, "no causal language model"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "--trust-remote-code"),
        ({"hidden_size": "wide"}, "does not describe a llama"),
    ],
)
def test_a_network_that_cannot_be_opened_is_one_line(tiny_llama, tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as said:
        base_of(with_config(tiny_llama, tmp_path / "m", **changes))
    assert "\n" not in str(said.value)


def test_gptq_settings_in_a_file_of_their_own_are_read(tiny_llama, tmp_path):
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "q", bits=4, group_size=32)
    settings = json.loads((stage.weights / "config.json").read_text())["quantization_config"]
    older = with_config(stage.weights, tmp_path / "older", quantization_config=None)
    (older / "quantize_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "quant_method"}))
    base = base_of(older)
    assert base.packed
    with base.open("cpu") as one, stage.open("cpu") as other:
        assert torch.equal(logits_of(one.module, some_ids()), logits_of(other.module, some_ids()))
    (older / "quantize_config.json").unlink()
    with pytest.raises(UserError, match=r"packed layers \(\*.qweight\) and says nowhere"):
        base_of(older)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "none"}}', ""])
def test_a_broken_tokenizer_is_one_line(tiny_llama, tmp_path, content):
    folder = with_config(tiny_llama, tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer of .* cannot be read") as said:
        base_of(folder).open("cpu").__enter__()
    assert "\n" not in str(said.value)


def test_tokens_without_embeddings_are_refused(tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    folder = with_config(tiny_llama, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new-word>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="none for '<new-word>'"):
        base_of(folder).open("cpu").__enter__()


@pytest.mark.parametrize("task", [{"perplexity": {"window": 600}}, {"divergence": {"window": 600}}])
def test_a_window_over_the_positions_is_refused_before_anything_runs(tiny_llama, task):
    asked: Any = plugin.build(task, "tasks")
    with pytest.raises(UserError, match="600 tokens: the model has 512 positions"):
        asked.check_base(base_of(tiny_llama))
    lora: Any = plugin.build({"adapt.lora": {"data": "pydoc", "max_length": 600}})
    with pytest.raises(UserError, match="600 tokens"):
        lora.check_base(base_of(tiny_llama))
    assert CPU.device == "cpu"


def test_where_no_limit_is_stated_nothing_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    formats.check_length(tmp_path, 10**6)
