"""What a known network sees in images: the features between whose Gaussians the Fréchet distance is taken."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.files import cache, make_whole, sha256_files, sha256_text
from llmq.types import Loaded

LITE0_SIZE = 224
BATCH = 8  # what fits into a processor's cache: batches of 50 take twice as long


@dataclass(frozen=True)
class Extractor:
    """A network without its classifier, and what to call its features."""

    name: str
    identity: str
    """What tells these weights from others."""
    of_batch: Callable[[Any], Any]
    """Images float `(n, 3, height, width)` on [0, 255] to features `(n, d)`."""

    def __call__(self, images: Sequence[Any]) -> Any:
        """The features float64 `(n, d)` of images uint8 `(height, width, 1 or 3)` of one size."""
        import numpy as np
        import torch

        parts = []
        for i in range(0, len(images), BATCH):
            pixels = torch.from_numpy(np.stack(images[i : i + BATCH])).permute(0, 3, 1, 2).float()
            with torch.inference_mode():
                parts.append(self.of_batch(pixels.expand(-1, 3, -1, -1)).double().cpu())
        return torch.cat(parts).numpy()


def extractor(inception: Path | None, device: str) -> Extractor:
    """FID's Inception out of a file of its weights, or EfficientNet-Lite0 without one."""
    return of_inception(inception, device) if inception else of_lite0(device)


def of_inception(path: Path, device: str) -> Extractor:
    """The 2048 pooled features of FID's Inception. Raises `UserError` for a file of other weights."""
    from torch import nn

    from llmq.models.state import load_strictly, read_state
    from llmq.tasks.inception import fid_inception, resized

    network = fid_inception()
    load_strictly(network, read_state(str(path)), str(path))
    network.fc = nn.Identity()
    network.eval().to(device)
    identity = sha256_files([path])

    return Extractor("FID's Inception, 2048 features", identity, lambda x: network((resized(x.to(device)) - 128) / 128))


def of_lite0(device: str) -> Extractor:
    """The 1280 pooled features of EfficientNet-Lite0 trained on ImageNet."""
    import timm
    import torch
    from torch.nn.functional import interpolate

    from llmq.models.efficientnet_lite0 import ARCHITECTURE, MEAN, STD, WORD, lite0_file, state_of_lite0
    from llmq.models.state import load_strictly

    network = timm.create_model(ARCHITECTURE)
    load_strictly(network, state_of_lite0(network), WORD)
    network.reset_classifier(0)
    network.eval().to(device, memory_format=torch.channels_last)

    def of_batch(pixels: Any) -> Any:
        scaled = interpolate(pixels.to(device), (LITE0_SIZE, LITE0_SIZE), mode="bilinear", antialias=True)
        return network(((scaled / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last))

    name = f"EfficientNet-Lite0, 1280 features, images scaled to {LITE0_SIZE} pixels; not FID"
    return Extractor(name, sha256_files([lite0_file()]), of_batch)


def kept(extract: Extractor, loaded: Loaded, n: int, seed: int, purpose: str) -> Any:
    """The features of a generator's samples, kept in the cache: those of the base are wanted beside every stage."""
    import torch
    from safetensors.numpy import load_file, save_file

    artifact = loaded.artifact
    model: Any = artifact.model
    about = [model.word, model.model_dump_json(), sha256_files(artifact.weight_files()), loaded.device]
    about += [extract.name, extract.identity, str(n), str(seed), purpose, torch.__version__]

    def fill(folder: Path) -> None:
        rows = extract(model.generate(loaded, model.latents(n, seed, purpose)))
        save_file({"rows": rows}, folder / "features.safetensors")

    folder = make_whole(cache("features", sha256_text(*about)[:24]), fill, shared=True)
    return load_file(folder / "features.safetensors")["rows"]
