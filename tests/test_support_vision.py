"""Every family of image models under every word: right when it is opened again, or refused in one line.

Writes `llmq/support/vision.json` where LLMQ_WRITE_SUPPORT is set; else twelve rows are tried again.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support_tables
import torch
from helpers import CPU, apply
from test_hf_detector import CONFIGS

from llmq import plugin, support
from llmq.artifact import Artifact
from llmq.errors import LlmqError
from llmq.files import bytes_of
from llmq.openvino_runtime import core
from llmq.vision.likeness import in_order_of
from llmq.vision.state import save_network

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
    "d_fine": {**HYBRID, "decoder_in_channels": [96, 96]},
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
CLOSE = {
    "classifier": {"float16": 0.02, "dynamic": 0.1, "int8": 0.6},
    "detector": {"float16": 0.02, "dynamic": 0.3, "int8": 0.6},
}
"""How far a stage's outputs may be from the network's, as a share of their norm: a little more than the most that was
seen.

Random networks amplify more than trained ones: DeiT's twelve blocks (0.44 under int8), SSDLite's 60 layers in a row,
each normalized (0.55), D-FINE's choice of queries (0.23 under dynamic). Most convolutional ones stay below 0.1."""


def data_of(model: Any) -> dict[str, Any]:
    """What its kind learns from."""
    return {"scenes": {"train": 8, "held_out": 2}} if model.kind == "detector" else {"digits": {}}


def images_for(model: Any, n: int) -> torch.Tensor:
    """Images of its data, as the network sees them."""
    data: Any = plugin.build(data_of(model), "data")
    return torch.cat(list(model.calibration(data.read(), n, 0)))


def settled(base: Artifact, folder: Path) -> Artifact:
    """A random network of which every layer matters to what it says, as after a training.

    What begins at zero would shut its branch, or the head. Batch norms of a detector learn the spread of what reaches
    them: without, it vanishes layer by layer, queries are chosen among scores that are all alike, and int8 rounds
    everything to zero. Those of classifiers do not: deep random networks are chaotic when every layer is normalized.
    """
    with base.open("cpu") as loaded, torch.no_grad():
        norms = [m for m in loaded.module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            if not norm.weight.any():
                norm.weight.fill_(0.2)
        for layer in loaded.module.modules():
            if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
                torch.nn.init.normal_(layer.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        if norms and base.model.kind == "detector":
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            loaded.module(images_for(base.model, 8))
        folder.mkdir()
        save_network(loaded.module, folder)
    return replace(base, weights=folder)


def answers(artifact: Artifact, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What an artifact makes of images."""
    with artifact.open("cpu") as loaded, torch.inference_mode():
        made = loaded.module(images)
    return tuple(made) if isinstance(made, list | tuple) else (made,)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference, as a share of that of `other`."""
    assert one.isfinite().all()
    return float((one - other).norm() / other.norm())


def most_rows(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nine tenths of the rows, the nearest: of two queries with nearly one score rounding chooses the other."""
    off = (one - other).norm(dim=-1).flatten()
    kept = off.argsort()[: len(off) * 9 // 10]
    return one.flatten(0, 1)[kept], other.flatten(0, 1)[kept]


def check(word: str, before: Artifact, folder: Path) -> Artifact:
    """Quantize, and hold what was kept against plain OpenVINO and against the network before."""
    model: Any = before.model
    its = {"data": data_of(model), "samples": 8, "fast_bias_correction": True} if word == "int8" else {}
    its |= {"compute_dtype": "float32"} if word == "dynamic" else {}
    stage = apply(f"quantize.{word}", before, folder, **its)
    stage.save(folder)
    assert bytes_of(stage.weight_files()) < bytes_of(before.weight_files())
    images = images_for(model, 2)
    found, truths = answers(Artifact.load(folder), images), answers(before, images)
    library = core()
    graph = library.read_model(folder / "model.xml")
    graph.reshape(list(images.shape))
    compiled = library.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    plain = tuple(torch.from_numpy(each) for each in compiled(images.numpy()).values())
    if model.unordered:
        found, plain = in_order_of(truths, found), in_order_of(truths, plain)
    for ours, theirs, truth in zip(found, plain, truths, strict=True):
        assert ours.shape == truth.shape
        assert distance(ours, theirs) < 0.01
        if model.unordered:
            ours, truth = most_rows(ours, truth)
        assert distance(ours, truth) < CLOSE[model.kind][word], (word, distance(ours, truth))
    return stage


def outcome(column: str, base: Artifact, folder: Path) -> str:
    """`right`, or the one line in which llmq refuses."""
    try:
        if column != "channels":
            check(column, base, folder)
        else:
            its = {"max_steps": 2, "batch_size": 2, "data": data_of(base.model), "held_out_examples": 2}
            narrow = apply("prune.channels", base, folder / "1", ratio=0.25)
            check("int8", apply("adapt.train", narrow, folder / "2", **its), folder / "3")
    except LlmqError as error:
        line = str(error).replace(str(folder), "")
        assert "\n" not in line
        assert base.model.title in line
        return line
    return support.RIGHT


def wording(row: Mapping[str, str]) -> dict[str, str]:
    """A row without the figures of its refusals, which differ from one processor to the next."""
    return {column: re.sub(r"-?\d+(\.\d+)?%?", "#", outcome) for column, outcome in row.items()}


IN_CI = (
    *("resnet10t", "mobilenetv3_small_050", "convnext_atto", "edgenext_xx_small", "ghostnet_050"),
    *("transformers resnet", "transformers vit", "transformers swin"),
    *("torchvision fcos", "torchvision faster_rcnn", "transformers detr", "transformers yolos"),
)
"""A spread: residual, depthwise, attention, layers that no input reaches, detectors of each kind, the refused.

Not RT-DETR and D-FINE: what random ones keep under int8 is near the bound of what is refused."""
ASKED = list(MODELS) if os.environ.get("LLMQ_WRITE_SUPPORT") else IN_CI
"""All rows where the table is written, which takes half an hour."""


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
        support_tables.write("vision", name, found)
    assert not wrong, (name, wrong)
    assert wording(support.cells("vision")[name]) == wording(found)


def test_the_table_holds_every_family_and_column():
    assert support.cells("vision").keys() == MODELS.keys()
    assert all(row.keys() == set(COLUMNS) for row in support.cells("vision").values())
