"""A Q4_K file of another house, measured beside our own 4 bits: the values, the bytes and the comparison are right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text_models
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf_again import written_again
from helpers import apply, base_of
from typer.testing import CliRunner

from llmq.artifact import Artifact
from llmq.cli import app
from llmq.errors import UserError
from llmq.judge import comparisons

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
Q4_K_M = 15
"""The number of that name of a whole file."""
LEAVES = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
SUITE = "- size\n- perplexity: {data: pydoc, limit: 2, window: 64}\n"


def q4_k(weight: np.ndarray) -> np.ndarray:
    """Rows rounded to blocks of Q4_K: 8 groups of 32 with scales and minima of 6 bits below two of float16."""
    groups = weight.astype(np.float32).reshape(-1, 8, 32)  # (blocks, groups, weights)
    least = -np.minimum(groups.min(-1), 0)  # (blocks, groups)
    step = (groups.max(-1) + least) / 15
    d, dmin = (np.maximum(v.max(-1, keepdims=True) / 63, 1e-7).astype(np.float16) for v in (step, least))
    s, m = (np.round(v / u).clip(0, 63).astype(np.uint8) for v, u in ((step, d), (least, dmin)))
    low = (dmin.astype(np.float32) * m)[..., None]
    codes = np.round((groups + low) / np.maximum(d.astype(np.float32) * s, 1e-9)[..., None]).clip(0, 15)
    pairs = codes.astype(np.uint8).reshape(-1, 4, 2, 32)
    scales = [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
    data = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), *scales, data], axis=1)
    return blocks.reshape(len(weight), -1)


def foreign(source: Path, file: Path) -> dict[str, np.ndarray]:
    """Write a file again with its MLPs as Q4_K; returns their values by the package gguf."""
    values = {}

    def rounded(tensor: Any) -> tuple[np.ndarray, GGMLQuantizationType] | None:
        if ".ffn_" not in tensor.name or len(tensor.shape) != 2:
            return None
        data = q4_k(np.asarray(tensor.data))
        _, layer, leaf, _ = tensor.name.split(".")
        values[f"model.layers.{layer}.mlp.{LEAVES[leaf]}.weight"] = dequantize(data, GGMLQuantizationType.Q4_K)
        return data, GGMLQuantizationType.Q4_K

    written_again(source, file, rounded, Q4_K_M)
    return values


def told(*words: str) -> str:
    """What a command of llmq prints."""
    ran = CliRunner().invoke(app, [*words])
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def measured(run: str) -> dict[str, float]:
    """Metric -> value of the only model of a run."""
    return {m["metric"]: m["value"] for m in json.loads(Path(run, "report.json").read_text())["measurements"]}


def base_and_theirs(tiny_llama: Path, folder: Path) -> tuple[Artifact, Path, dict[str, np.ndarray]]:
    """A model, a file of it with its MLPs as Q4_K, and their values."""
    base = base_of(tiny_text_models.build("llama", folder / "model", tiny_llama, **SHAPE), "float32")
    whole = apply("export.gguf", base, folder / "whole", type="f16")
    file = folder / "theirs-Q4_K_M.gguf"
    return base, file, foreign(whole.weights / "model.gguf", file)


@pytest.mark.slow
def test_a_foreign_q4_k_file_is_compared_with_our_own_bits(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("suite.yaml").write_text(SUITE)
    base, file, values = base_and_theirs(tiny_llama, tmp_path)
    file = file.relative_to(tmp_path)
    with base.open("cpu") as loaded:  # the same weights as plain floats: the oracle
        state: dict[str, Any] = loaded.module.state_dict()
        for name, value in values.items():
            off = np.linalg.norm(value - state[name].numpy()) / np.linalg.norm(value)
            assert 0 < off < 0.1, name
            state[name].copy_(torch.from_numpy(value))
        loaded.module.save_pretrained("floats")
        loaded.processor.save_pretrained("floats")
    ours = apply("quantize.rtn", base, tmp_path / "ours", bits=4, group_size=32)
    ours.save(ours.weights)
    for target, out in ((str(file), "a"), ("floats", "b")):
        told("eval", target, "--suite", "suite.yaml", "--out", out, "--dtype", "float32")
    told("eval", str(ours.weights), "--suite", "suite.yaml", "--out", "c")
    theirs, oracle, own = measured("a"), measured("b"), measured("c")
    assert theirs["bytes_on_disk"] == file.stat().st_size
    assert theirs["token_perplexity"] == pytest.approx(oracle["token_perplexity"], rel=1e-3)  # the rest is float16
    table = json.loads(told("compare", "a", "c", "--json"))
    # The file's own name and types, and not those of the floats that it was dequantized to.
    assert table["results"] == [file.name, "ours"]
    assert table["stored"] == {file.name: "Q4_K and float16", "ours": "4 bits in groups of 32 and float32"}
    shown = " ".join(told("compare", "c", "a").split())
    assert f"{file.name}: stored as Q4_K and float16, the base as 4 bits in groups of 32 and float32" in shown
    ratios = {pair["metric"]: pair["ratio"] for pair in table["comparisons"]}
    for metric in ("bytes_on_disk", "token_perplexity"):
        assert ratios[metric] == pytest.approx(own[metric] / theirs[metric], rel=1e-6), metric


def test_a_model_is_no_result_yet(tiny_llama, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"is a model; measure it first \(llmq eval .*x\.gguf --out NAME\)"):
        comparisons.targets([str(tmp_path / "x.gguf")])
    (tmp_path / "run.gguf").mkdir()  # a folder may have any name
    with pytest.raises(UserError, match="is no run or stage"):
        comparisons.targets([str(tmp_path / "run.gguf")])


@pytest.mark.slow
def test_a_run_on_a_foreign_file_tells_its_types(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, file, _ = base_and_theirs(tiny_llama, tmp_path)
    Path("job.yaml").write_text(
        f"model: {{causal_lm: {{weights: {file}}}}}\nsteps: [quantize.rtn]\nevaluate: [size]\ngate: [size <= base]\n"
    )
    told("run", "job.yaml", "--out", "run")
    report = json.loads(Path("run/report.json").read_text())
    assert [stage["stored"] for stage in report["stages"]] == [
        "Q4_K and float16",
        "4 bits in groups of 64 and bfloat16",
    ]
    assert report["foretold"]["stages"][0]["bytes_on_disk"] == file.stat().st_size
    source = report["stages"][0]["notes"]["source"]
    assert "stored as Q4_K and float16, dequantized to bfloat16" in source
    said = "stored as 4 bits in groups of 64 and bfloat16, the base as Q4_K and float16"
    assert report["gate"]["rules"][0]["stored"] == said
    assert said in " ".join(told("show", "run").split())
    assert said in Path("run/report.md").read_text()
