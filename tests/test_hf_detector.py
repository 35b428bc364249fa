"""Detectors of transformers: tiny random ones of each family, offline, and the same as the library's own."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU

from llmq import plugin
from llmq.errors import UserError
from llmq.vision.images import Example

HYBRID = {
    "num_labels": 5,
    "encoder_hidden_dim": 32,
    "d_model": 32,
    "encoder_in_channels": [16, 32, 64],
    "feat_strides": [8, 16, 32],
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "num_queries": 20,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 10,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 32],
    "stage_mid_channels": [4, 8, 8, 16],
    "stage_out_channels": [8, 16, 32, 64],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage3", "stage4"],
}
TWO_LEVELS = {
    "encoder_in_channels": [32, 64],
    "feat_strides": [16, 32],
    "decoder_in_channels": [32, 32],
    "decoder_n_points": [2, 2],
    "num_feature_levels": 2,
    "encode_proj_layers": [1],
    "depth_mult": 1 / 3,
}
"""Fewer than 512 tensors: Python's cache of regular expressions holds those that transformers makes of their names."""
CONFIGS: dict[str, dict[str, Any]] = {
    "rt_detr": {
        **HYBRID,
        "backbone_config": {"model_type": "rt_detr_resnet", **RESNET, "out_features": ["stage2", "stage3", "stage4"]},
    },
    "d_fine": {**HYBRID, **TWO_LEVELS, "backbone_config": HGNET},
    "detr": {
        "num_labels": 5,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_queries": 12,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {"model_type": "resnet", **RESNET, "out_features": ["stage4"]},
    },
    "yolos": {
        "num_labels": 5,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [64, 64],
        "patch_size": 8,
        "num_detection_tokens": 10,
    },
}


def model_of(family: str = "rt_detr", **settings: Any) -> Any:
    """A random detector of a family, checked as a recipe does."""
    config = {"model_type": family, **CONFIGS[family]}
    model: Any = plugin.build({"hf_detector": {"config": config, "size": 64, **settings}}, "models")
    model.check()
    return model


def some_examples() -> list[Example]:
    """Two images of unlike sizes with a box each."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((50, 80), (64, 40))]
    return [
        Example("x", image, boxes=np.array([[10, 10, 30, 40]], np.float32), labels=np.array([2])) for image in images
    ]


@pytest.mark.parametrize("family", CONFIGS)
def test_detections_are_those_of_transformers(family):
    model = model_of(family, score_threshold=0.01)
    images = [e.image for e in some_examples()]
    with model.base(CPU).open("cpu") as loaded:
        ours = model.detect(loaded, images)
        process = model._processor()
        inputs = process(
            images,
            size={"height": 64, "width": 64},
            do_pad=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        with torch.inference_mode():
            outputs = loaded.module.model(pixel_values=inputs["pixel_values"])
            assert [tuple(t.shape[::2]) for t in loaded.module(model.example(2))] == [
                (2, 5 + (family in SOFTMAX)),
                (2, 4),
            ]
    theirs = process.post_process_object_detection(outputs, 0.01, [(50, 80), (64, 40)])
    for found, their in zip(ours, theirs, strict=True):
        order = their["scores"].argsort(descending=True, stable=True)
        assert len(order) > 0
        for name in ("boxes", "scores", "labels"):
            assert np.array_equal(getattr(found, name), their[name][order].numpy())


SOFTMAX = ("detr", "yolos")
"""Families with one more logit, for no object."""


@pytest.mark.parametrize("family", CONFIGS)
def test_the_loss_is_that_of_transformers_and_reaches_every_layer(family):
    model = model_of(family)
    network = model.network().train()
    (learner,) = model.learners(network)
    batch = model.batch(some_examples(), np.random.default_rng(0), "none", None)
    torch.manual_seed(0)
    ours = learner.loss(batch)
    labels = [
        {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[x, y, w, h]], dtype=torch.float32)}
        for x, y, w, h in ((20 / 80, 25 / 50, 20 / 80, 30 / 50), (20 / 40, 25 / 64, 20 / 40, 30 / 64))
    ]
    torch.manual_seed(0)
    theirs = network.model(pixel_values=batch["images"], labels=labels).loss
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    ours.backward()
    grown = [p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters() if p.requires_grad]
    assert sum(grown) > 0.8 * len(grown)


def test_a_folder_of_transformers_is_opened_and_its_stage_needs_it_no_more(tmp_path):
    model = model_of("detr")
    torch.manual_seed(5)
    network = model.network().eval()
    network.model.config.id2label = dict(enumerate(("ant", "bee", "cat", "dog", "elk")))
    folder = tmp_path / "saved"
    network.model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "DetrImageProcessor", "size": {"height": 64, "width": 64}})
    )
    given: Any = plugin.build({"hf_detector": {"weights": str(folder)}}, "models")
    given.check()
    artifact = given.base(CPU)
    assert artifact.model.class_names() == ("ant", "bee", "cat", "dog", "elk")
    assert artifact.model.class_count() == 5
    folder.rename(tmp_path / "gone")
    with artifact.open("cpu") as loaded, torch.inference_mode():
        inputs = artifact.model.example(1)
        assert inputs.shape == (1, 3, 64, 64)
        for ours, theirs in zip(loaded.module(inputs), network(inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_a_new_head_keeps_all_but_the_last_layers(tmp_path):
    network = model_of("detr").network()
    network.model.save_pretrained(tmp_path)
    other: Any = plugin.build({"hf_detector": {"weights": str(tmp_path), "classes": 2, "new_head": True}}, "models")
    resolved = other.resolved()
    state, before = resolved.pretrained(), network.state_dict()
    changed = [name for name in state if not torch.equal(state[name], before[name]) or name not in before]
    assert changed == ["model.class_labels_classifier.weight", "model.class_labels_classifier.bias"]
    assert state[changed[1]].shape == (3,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "'weights' is needed, or a 'config' with a model_type, such as rt_detr"),
        (
            {"weights": "no such name"},
            "'no such name' is no local folder and no hub id (owner/name, or owner/name@revision)",
        ),
    ],
)
def test_weights_that_cannot_be_had_are_named(settings, message):
    model: Any = plugin.build({"hf_detector": settings}, "models")
    with pytest.raises(UserError) as error:
        model.check()
    assert str(error.value) == message


def test_a_configuration_of_another_kind_is_refused():
    model: Any = plugin.build({"hf_detector": {"config": {"model_type": "vit"}, "size": 64}}, "models")
    with pytest.raises(UserError, match="transformers has no object detector of model_type 'vit'"):
        model.network()
