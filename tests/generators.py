"""Small image networks whose outputs vary, with random weights; and stages of them that are off by some noise."""

from pathlib import Path
from typing import Any

import torch
from helpers import CPU

from llmq import plugin
from llmq.artifact import Artifact
from llmq.vision.state import save_network

GAN = {"dcgan": {"features": 4, "latent_size": 8}}


def lively(model: Any, folder: Path) -> Artifact:
    """A base whose convolutions keep the size of their input: fresh ones of a GAN make one grey."""
    base: Any = plugin.build(model, "models").base(CPU)
    with base.open("cpu") as loaded:
        torch.manual_seed(1)
        for weight in loaded.module.parameters():
            if weight.dim() == 4:
                torch.nn.init.normal_(weight, 0, (8 / weight[0].numel()) ** 0.5)
        return kept(base, loaded.module, folder)


def off(base: Artifact, folder: Path, noise: float) -> Artifact:
    """A stage whose convolutions are off by a share of their own size."""
    with base.open("cpu") as loaded, torch.no_grad():
        torch.manual_seed(2)
        for weight in loaded.module.parameters():
            if weight.dim() == 4:
                weight += noise * weight.std() * torch.randn_like(weight)
        return kept(base, loaded.module, folder)


def kept(artifact: Artifact, network: Any, folder: Path) -> Artifact:
    """A network at rest."""
    folder.mkdir(parents=True)
    save_network(network, folder)
    step: Any = plugin.build("prune.magnitude")
    return artifact.then(step, weights=folder)
