"""Every family of image models under every word: right when it is opened again, or refused in one line.

Writes `llmq/support/vision.json` where LLMQ_WRITE_SUPPORT is set.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, apply
from test_hf_detector import CONFIGS

from llmq import plugin, support
from llmq.errors import LlmqError
from llmq.files import bytes_of
from llmq.models.runtime import core
from llmq.models.state import save_network
from llmq.models.vision import named
from llmq.types import Artifact

pytestmark = pytest.mark.slow

TIMM = {
    **dict.fromkeys(("resnet10t", "mobilenetv3_small_050", "efficientnet_lite0", "regnetx_002", "convnext_atto"), 64),
    **dict.fromkeys(("edgenext_xx_small", "ghostnet_050", "mnasnet_050", "repvgg_a0", "fbnetc_100", "tinynet_e"), 64),
    **dict.fromkeys(("lcnet_035", "densenet121", "mobilevit_xxs", "repghostnet_050", "starnet_s1", "fastvit_t8"), 64),
    **dict.fromkeys(("vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224", "xcit_nano_12_p16_224"), 64),
    "levit_128s": 224,
    "poolformerv2_s12": 64,
}
PATCHES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
SMALL_VIT = {**PATCHES, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [64, 128], "depths": [1, 1], "num_stages": 2}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 32, "hidden_sizes": [64, 256], "depths": [1, 1]},
    "vit": SMALL_VIT,
    "deit": SMALL_VIT,
    "convnext": {**STAGES, "image_size": 32},
    "beit": SMALL_VIT,
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 64,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}
TORCHVISION = ("fcos", "retinanet", "ssd", "ssdlite", "faster_rcnn")
HYBRID = {
    "encoder_hidden_dim": 96,
    "d_model": 96,
    "decoder_in_channels": [96, 96, 96],
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
}
WIDER: dict[str, dict[str, Any]] = {
    "rt_detr": HYBRID,
    "d_fine": HYBRID,
    "detr": {"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256},
    "yolos": {"hidden_size": 192, "intermediate_size": 768},
}
"""So wide that weights outweigh the description of the graph."""
MODELS: dict[str, Any] = {
    **{n: {"timm_classifier": {"architecture": n, "classes": 10, "input_size": s}} for n, s in TIMM.items()},
    **{
        f"transformers {n}": {"hf_classifier": {"config": {"model_type": n, "num_labels": 10, **its}}}
        for n, its in CLASSIFIERS.items()
    },
    **{f"torchvision {n}": {"torchvision_detector": {"architecture": n, "classes": 10}} for n in TORCHVISION},
    **{
        f"transformers {n}": {
            "hf_detector": {"config": {"model_type": n, **its, **WIDER[n], "num_labels": 10}, "size": 64, "classes": 10}
        }
        for n, its in CONFIGS.items()
    },
}
WORDS = ("int8", "dynamic", "float16")
COLUMNS = (*WORDS, "channels")
CLOSE = {"float16": 0.02, "dynamic": 0.15}


def settled(base: Artifact, folder: Path) -> Artifact:
    """A random network whose batch norms know the spread of what reaches them, as after a training.

    Untrained ones let it vanish or explode layer by layer: detectors then choose among queries that are all alike, and
    int8 rounds everything to zero.
    """
    with base.open("cpu") as loaded, torch.no_grad():
        norms = [m for m in loaded.module.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for seed in range(4 if norms else 0):
            like = base.model.example(4)  # type: ignore[attr-defined]
            loaded.module(torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)))
        folder.mkdir()
        save_network(loaded.module, folder)
    return replace(base, weights=folder)


def data_of(artifact: Artifact) -> dict[str, Any]:
    """What its kind learns from."""
    return {"scenes": {"train": 4, "held_out": 2}} if artifact.model.kind == "detector" else {"digits": {}}


def answers(artifact: Artifact) -> tuple[torch.Tensor, ...]:
    """What an artifact makes of its example."""
    with artifact.open("cpu") as loaded, torch.inference_mode():
        made = loaded.module(artifact.model.example(2))  # type: ignore[attr-defined]
    return tuple(made) if isinstance(made, list | tuple) else (made,)


def check(word: str, before: Artifact, folder: Path) -> Artifact:
    """Quantize, and hold what was kept against plain OpenVINO and against the network before."""
    its = {"data": data_of(before), "samples": 4, "fast_bias_correction": True} if word == "int8" else {}
    its |= {"compute_dtype": "float32"} if word == "dynamic" else {}
    stage = apply(f"quantize.{word}", before, folder, **its)
    stage.save(folder)
    found = answers(Artifact.load(folder))
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core().compile_model(str(folder / "model.xml"), "CPU", options)
    plain = compiled(before.model.example(2).numpy())  # type: ignore[attr-defined]
    for ours, theirs in zip(found, plain.values(), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0.05, atol=0.05 * float(ours.abs().max()))
    for ours, truth in zip(found, answers(before), strict=True):
        assert ours.shape == truth.shape
        print(
            "MARGIN",
            stage.model.word,
            getattr(stage.model, "architecture", None) or stage.model.config["model_type"],
            stage.history,
            word,
            float((ours - truth).norm() / truth.norm()),
            float(torch.nn.functional.cosine_similarity(ours.flatten(), truth.flatten(), 0)),
            float(bytes_of(before.weight_files()) / bytes_of(stage.weight_files())),
        )
        assert float((ours - truth).norm() / truth.norm()) < CLOSE.get(word, 1.0)
    assert bytes_of(stage.weight_files()) < bytes_of(before.weight_files())
    return stage


def outcome(column: str, base: Artifact, folder: Path) -> str:
    """`right`, or the one line in which llmq refuses."""
    try:
        if column != "channels":
            check(column, base, folder)
        else:
            its = {"max_steps": 2, "batch_size": 2, "data": data_of(base), "held_out_examples": 2}
            narrow = apply("prune.channels", base, folder / "1", ratio=0.25)
            check("int8", apply("adapt.train", narrow, folder / "2", **its), folder / "3")
    except LlmqError as error:
        line = str(error).replace(str(folder), "")
        assert "\n" not in line
        assert named(base.model) in line
        return line
    return support.RIGHT


ASKED = list(MODELS) if os.environ.get("LLMQ_WRITE_SUPPORT") else list(support.cells("vision"))
"""Rows that were seen; all of them where the table is written."""


@pytest.mark.parametrize("name", ASKED)
def test_every_word_is_right_or_one_line(name, tmp_path):
    torch.set_num_threads(1)
    model: Any = plugin.build(MODELS[name], "models")
    model.check()
    base = settled(model.base(CPU), tmp_path / "base")
    found, wrong = {}, {}
    for column in COLUMNS:
        try:
            found[column] = outcome(column, base, tmp_path / column)
        except Exception as error:  # noqa: BLE001  # every cell is looked at before the test fails
            wrong[column] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if os.environ.get("LLMQ_WRITE_SUPPORT"):
        support.write("vision", name, found)
    assert not wrong, (name, wrong)
    assert support.cells("vision")[name] == found


def test_the_table_holds_whole_rows_of_these_families():
    table = support.cells("vision")
    assert table
    assert table.keys() <= MODELS.keys()
    assert all(row.keys() == set(COLUMNS) for row in table.values())
