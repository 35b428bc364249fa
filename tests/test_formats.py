"""Folders that are not read are refused in one line that names what they are and the cure."""

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import apply, base_of, logits_of, some_ids

from llmq import plugin
from llmq.errors import UserError
from llmq.text import formats, weights


def with_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a folder whose configuration says otherwise; None takes a key away."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    said = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (target / "config.json").write_text(json.dumps(said))
    return target


# Names as transformers' `QuantizationMethod` has them -> as a person knows them, and the cure of each.
OTHERS = {
    "awq": ("AWQ", "quantize.gptq {bits: 4, group_size: 128} packs that"),
    "compressed-tensors": ("compressed-tensors", "CompressedTensorsConfig(dequantize=True)"),
    "hqq": ("HQQ", "quantize.rtn {bits: 4, mse: true} packs that"),
    "quanto": ("Quanto", "quantize.rtn {bits: 8} packs that"),
    "aqlm": ("AQLM", "quantize.gptq {bits: 2} packs that"),
    "torchao": ("torchao", "quantize.rtn {bits: 4} packs that"),
    "bitnet": ("BitNet", "...-bf16"),
    "fp8": ("fine-grained FP8", "FineGrainedFP8Config(dequantize=True)"),
    "mxfp4": ("MXFP4", "Mxfp4Config(dequantize=True)"),
    "auto-round": ("AutoRound", "format='auto_gptq'"),
}
OTHERS |= {
    name: (repr(name), "its own library")
    for name in ("eetq", "higgs", "vptq", "spqr", "quark", "fbgemm_fp8", "nobody-knows")
}


@pytest.mark.parametrize("method", OTHERS)
def test_a_packed_format_that_is_not_read_is_named_with_its_cure(tiny_llama, tmp_path, method):
    folder = with_config(tiny_llama, tmp_path / "m", quantization_config={"quant_method": method})
    (folder / "model.safetensors").unlink()  # torchao's are pickled, so that the lack of others is not what to say
    name, cure = OTHERS[method]
    with pytest.raises(UserError) as said:
        weights.check_weights(str(folder))  # as `llmq check` does
    assert f"packed by {name}, which is not read here" in str(said.value)
    assert "name the float model" in str(said.value)
    assert cure in str(said.value)
    assert "\n" not in str(said.value)


def test_every_setting_that_a_cure_names_is_there():
    import transformers

    for _, cure in formats.OTHERS.values():
        for step, settings in re.findall(r"quantize\.(\w+) (\{.*?\})", cure):
            plugin.build({f"quantize.{step}": yaml.safe_load(settings)})
        for name in re.findall(r"(\w+Config)\(dequantize=True\)", cure):
            assert "dequantize" in inspect.signature(getattr(transformers, name)).parameters


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compression_config": {"format": "pack-quantized"}}, "by compressed-tensors, .* its own library"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "by compressed-tensors, .* its own library"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "by AWQ, "),
        ({"quantization_config": {"bits": 4}}, "no 'quant_method' in its quantization_config"),
        ({"quantization_config": {"quant_method": ["awq"]}}, r"by \['awq'\], "),
        ({"quantization_config": [4]}, "quantization_config is no object"),
    ],
)
def test_wherever_a_configuration_says_so_it_is_read(tiny_llama, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        formats.quantization(with_config(tiny_llama, tmp_path / "m", **changes))


@pytest.mark.parametrize(
    "said", [{"quantization_config": {"load_in_4bit": True}}, {"text_config": {"quantization_config": {"bnb_4bit": 1}}}]
)
def test_settings_of_bitsandbytes_need_no_method(tiny_llama, tmp_path, said):
    found = formats.quantization(with_config(tiny_llama, tmp_path / "m", **said))
    assert found
    assert found["quant_method"] == "bitsandbytes"


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
    with pytest.raises(UserError, match=r"packed layers \(\*.qweight\), and none of its files states"):
        base_of(older)
    (older / "quantize_config.json").write_text('{"quant_method": "awq"}')
    with pytest.raises(UserError, match="packed by AWQ"):
        weights.check_weights(str(older))
    (older / "quantize_config.json").unlink()
    (older / "quant_config.json").write_text('{"zero_point": true, "q_group_size": 128, "w_bit": 4}')  # AutoAWQ's
    with pytest.raises(UserError, match="packed by AWQ, which is not read here"):
        weights.check_weights(str(older))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "none"}}', ""])
def test_a_broken_tokenizer_is_one_line(tiny_llama, tmp_path, content):
    folder = with_config(tiny_llama, tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer of .* cannot be read") as said:
        base_of(folder).open("cpu").__enter__()
    assert "\n" not in str(said.value)
