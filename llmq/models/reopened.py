"""Every save is opened again: what a step wrote must answer as what the step meant to write.

Where a whole model was in memory, both answer one fixed input (`Model.probe`); where only a block was, `written`
compares the tensors of its file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.artifact import Artifact
from llmq.errors import LlmqError
from llmq.types import Model

REPACKED = 0.03
"""How far answers may be apart, as a share of their norm, where a library computes otherwise once weights are packed
anew: bitsandbytes multiplies 4-bit weights by another kernel than the one that training needs."""


@dataclass(frozen=True)
class Meant:
    """What an open module says, and a hash of each of its tensors: all that is kept of it once it is gone."""

    answers: Sequence[Any]
    tensors: Mapping[str, str]


def meant(model: Model, module: Any) -> Meant:
    """What is to be found again on disk. Tensors come first: bitsandbytes repacks some when the module answers."""
    hashes = _hashes(module)
    return Meant(model.probe(module), hashes)


def reopened(what: Meant, artifact: Artifact, device: str, tolerance: float = 0.0) -> Artifact:
    """The artifact, opened from disk and asked the same. Raises `LlmqError` that names the first other tensor."""
    with artifact.open(device) as loaded:
        found = meant(artifact.model, loaded.module)
    names = [*what.tensors, *(found.tensors.keys() - what.tensors.keys())]
    other = next((name for name in names if what.tensors.get(name) != found.tensors.get(name)), None)
    apart = max((_apart(a, b) for a, b in zip(what.answers, found.answers, strict=True)), default=0.0)
    if other or not apart <= tolerance:
        why = f"{other} differs" if other else f"its answers are apart by {apart:.1e}, and no tensor is"
        place = str(artifact.adapter or artifact.weights)
        raise LlmqError(f"{artifact.history[-1]}: {place!r} does not hold the model that was to be saved: {why}")
    return artifact


def written(tensors: Mapping[str, Any], file: Path) -> None:
    """Raise `LlmqError` unless a safetensors file holds these tensors to the bit, and no other."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        for name, tensor in tensors.items():
            if name not in names or not same_bits(opened.get_tensor(name), tensor):
                raise LlmqError(f"{str(file)!r}: {name} is not what was to be written; is the disk sound?")
        if more := sorted(names - tensors.keys()):
            raise LlmqError(f"{str(file)!r} holds {more[0]}, which was not to be written")


def same_bits(a: Any, b: Any) -> bool:
    import torch

    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bytes(a), _bytes(b.cpu())))


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _hashes(module: Any) -> dict[str, str]:
    import torch

    state = ((name, t) for name, t in module.state_dict().items() if isinstance(t, torch.Tensor))
    return {name: hashlib.sha256(_bytes(t.cpu()).numpy()).hexdigest() for name, t in state}


def _apart(meant: Any, found: Any) -> float:
    """The norm of the difference as a share of that of the answer; 0 for the same bits."""
    if same_bits(meant, found):
        return 0.0
    if meant.shape != found.shape:
        return float("inf")
    apart = float((found.double() - meant.double()).norm() / meant.double().norm().clamp_min(1e-30))
    return apart if apart == apart else float("inf")
