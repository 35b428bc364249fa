"""GGUF files as they are in OpenVINO: the reader of GenAI is right, or its rounding is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, apply, base_of, logits_of, some_ids

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.text.gguf import graph as gguf_graph

pytestmark = pytest.mark.usefixtures("one_thread")


def opened_in(runtime: str, weights: Path | str) -> Artifact:
    """A model in a runtime, at rest."""
    model: Any = plugin.build(
        {"causal_lm": {"weights": str(weights), "dtype": "float32", "runtime": runtime}}, "models"
    )
    model.check()
    artifact: Artifact = model.base(CPU)
    return artifact


def distance(file: Path) -> tuple[float, Artifact]:
    """The largest difference of the logits in OpenVINO from those in torch, relative; and the former at rest."""
    ids = some_ids()
    here, there = opened_in("torch", file), opened_in("openvino", file)
    with here.open("cpu") as one, there.open("cpu") as other:
        meant, made = logits_of(one.module, ids), logits_of(other.module, ids)
        assert one.processor("a b")["input_ids"] == other.processor("a b")["input_ids"]
    return float((meant - made).abs().max() / meant.abs().max()), there


def test_fractional_zero_points_are_rounded_there_and_it_is_said(tiny_llama: Path, tmp_path: Path):
    file = apply("export.gguf", base_of(tiny_llama), tmp_path / "gguf", type="q4_1").weights / "model.gguf"
    off, stage = distance(file)
    assert off > 1e-2
    assert "rounds the zero points of 15 tensors (Q4_1)" in stage.notes["finding"]
    assert stage.bytes_on_disk == file.stat().st_size


def test_whole_zero_points_are_kept(tiny_llama: Path, tmp_path: Path):
    packed = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "packed", bits=4, group_size=32, sym=False)
    off, stage = distance(apply("export.gguf", packed, tmp_path / "gguf").weights / "model.gguf")
    assert off < 1e-3
    assert "finding" not in stage.notes


@pytest.mark.slow
def test_the_built_in_file_is_rounded_there():
    assert "rounds the zero points of 210 tensors (Q4_1)" in opened_in("openvino", "smollm2-135m").notes["finding"]


def test_another_architecture_is_refused_with_those_that_are_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = apply("export.gguf", base_of(tiny_llama), tmp_path / "gguf").weights / "model.gguf"
    monkeypatch.setattr(gguf_graph, "READ", ("qwen2",))
    with pytest.raises(UserError, match="reads GGUF files of qwen2; leave runtime out"):
        opened_in("openvino", file)


def test_a_folder_without_a_graph_is_refused(tiny_llama: Path):
    with pytest.raises(UserError, match="is neither; llmq export writes such a folder"):
        opened_in("openvino", tiny_llama)


def test_k_quants_have_zero_points_as_well():
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType.Q4_K
    blocks = np.random.default_rng(0).integers(0, 256, (6, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    blocks[:, :4] = np.array([0.5, 0.25], np.float16).view(np.uint8)
    scales, least = gguf_graph._grid(blocks, "Q4_K")
    blocks[:, 16:] = 0  # every code is 0: what is left is the least value
    assert np.allclose(dequantize(blocks, kind).reshape(-1, 32)[:, 0], least)
    blocks[:, 16:] = 0x11
    assert torch.allclose(
        torch.from_numpy(dequantize(blocks, kind).reshape(-1, 32)[:, 0]).double(), torch.from_numpy(least + scales)
    )
