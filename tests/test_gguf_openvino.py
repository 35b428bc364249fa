"""GGUF files as they are in OpenVINO: the reader of GenAI is right, or its rounding is said."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text_models
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize
from gguf_again import written_again
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


TYPES = {"Q4_K_M": 15}
"""The number of a name of a whole file in GGUF."""
HALVES = {"Q4_K": {0: 2e-4, 2: 1.5e-3}, "Q6_K": {208: 2e-5}, "Q5_0": {0: 4e-3}, "Q2_K": {80: 3e-3, 82: 3e-3}}
"""The places of the scales in a block of each type, and their values; all other bytes are drawn."""


def foreign(source: Path, file: Path, kinds: dict[str, str], said: int = TYPES["Q4_K_M"]) -> None:
    """Write a file again with drawn blocks in place of some matrices: the end of a name -> a type."""
    rng = np.random.default_rng(0)

    def drawn(tensor: Any) -> tuple[np.ndarray, GGMLQuantizationType] | None:
        kind = kinds.get(tensor.name.split(".")[-2])
        if kind is None:
            return None
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        made = rng.integers(0, 256, (tensor.n_elements // block, size), dtype=np.uint8)
        for at, value in HALVES[kind].items():
            made[:, at : at + 2] = np.array([value], np.float16).view(np.uint8)
        return made.reshape(len(tensor.data), -1), GGMLQuantizationType[kind]

    written_again(source, file, drawn, said)


@pytest.fixture(scope="module")
def wide(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of F16 whose rows are as long as blocks of K-quants."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    base = base_of(tiny_text_models.build("llama", folder / "model", tiny_llama, **shape), "float32")
    return apply("export.gguf", base, folder / "gguf", type="f16").weights / "model.gguf"


def as_read_there(file: Path) -> dict[str, np.ndarray]:
    """The values of each Q4_K matrix with its zero points as GenAI keeps them: rounded, and modulo 16."""
    found = {}
    for tensor in GGUFReader(file).tensors:
        if tensor.tensor_type.name == "Q4_K":
            blocks = np.ascontiguousarray(tensor.data).reshape(-1, GGML_QUANT_SIZES[tensor.tensor_type][1])
            scales, least = (v.astype(np.float16).astype(float) for v in gguf_graph._grid(blocks, "Q4_K"))
            pairs = blocks[:, 16:].reshape(-1, 4, 32)  # 64 codes in 32 bytes: the low halves, then the high ones
            codes = np.stack([pairs & 15, pairs >> 4], 2).reshape(-1, 32)
            with np.errstate(divide="ignore", invalid="ignore"):
                zeros = np.where(scales == 0, 0, np.floor(-least / scales + 0.5) % 16)
            found[tensor.name] = ((codes - zeros[:, None]) * scales[:, None]).reshape(len(tensor.data), -1)
    return found


def test_k_quants_run_with_rounded_zero_points_as_it_is_said(wide: Path, tmp_path: Path):
    file = tmp_path / "x-Q4_K_M.gguf"
    foreign(wide, file, {"ffn_gate": "Q4_K", "ffn_up": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"})
    ids = some_ids()
    here, there = opened_in("torch", file), opened_in("openvino", file)
    with here.open("cpu") as one, there.open("cpu") as other:
        made, exact = logits_of(other.module, ids), logits_of(one.module, ids)
        moved, state = [], one.module.state_dict()
        for name, values in as_read_there(file).items():
            weight = state[f"model.layers.0.mlp.{name.split('.')[2].removeprefix('ffn_')}_proj.weight"]
            moved.append([float(((weight.numpy() - values) ** 2).sum()), float((weight.numpy() ** 2).sum())])
            weight.copy_(torch.from_numpy(values))
        meant = logits_of(one.module, ids)
    assert (made - meant).abs().max() < 1e-3 * meant.abs().max()
    assert (made - exact).abs().max() > 1e-2 * meant.abs().max()
    share = (sum(part for part, _ in moved) / sum(whole for _, whole in moved)) ** 0.5
    assert f"zero points of 2 tensors (Q4_K) to 4 bits: it runs weights that lie {share:.1%}" in there.notes["finding"]
    assert there.stored == "Q6_K, Q4_K and float16"


def test_types_without_zero_points_are_those_of_the_file(wide: Path, tmp_path: Path):
    foreign(wide, tmp_path / "x.gguf", dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down", "attn_q"), "Q6_K"))
    off, stage = distance(tmp_path / "x.gguf")
    assert off < 1e-3
    assert "finding" not in stage.notes


@pytest.mark.parametrize(
    ("kind", "said", "says"),
    [
        (
            "Q5_0",
            15,
            "has 2 matrices of Q5_0, and OpenVINO GenAI reads F16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K; leave runtime",
        ),
        ("Q2_K", 15, "has 2 matrices of Q2_K, and"),
        ("Q4_K", 1, "has tensors of Q4_K and its general.file_type says F16, which OpenVINO GenAI goes by; leave"),
    ],
)
def test_what_genai_does_not_read_is_refused_by_name(kind: str, said: int, says: str, wide: Path, tmp_path: Path):
    foreign(wide, tmp_path / "x.gguf", {"ffn_gate": kind, "ffn_up": kind}, said)
    with pytest.raises(UserError, match=re.escape(says)):
        opened_in("openvino", tmp_path / "x.gguf")


def test_k_quants_have_zero_points_as_well():
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


def test_scaled_rotary_positions_are_refused_as_genai_leaves_the_scaling_out(tiny_llama: Path, tmp_path: Path):
    rope = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    base = base_of(tiny_text_models.build("llama", tmp_path / "model", tiny_llama, rope_parameters=rope), "float32")
    file = apply("export.gguf", base, tmp_path / "gguf").weights / "model.gguf"
    with pytest.raises(UserError, match=r"scales its rotary positions \(linear\), which OpenVINO GenAI leaves out"):
        opened_in("openvino", file)
