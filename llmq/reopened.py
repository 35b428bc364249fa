"""Proof that a save holds the model: the files are opened again and compared. Notes on how far a training moved one.

Where a whole model was in memory, both answer one fixed input (`Model.probe`); where only a block was, `written`
compares the tensors of the file. The report of a training that changed nothing says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmq import resident
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.artifact import Artifact
    from llmq.types import Model

REPACKED = 0.03
"""The greatest distance of two answers, as a share of their norm, where a library computes otherwise once weights are
packed anew: bitsandbytes multiplies 4-bit weights by another kernel than the one that training needs."""
LEAST = 1e-7
"""A change of the weights, as a share of their norm, that float32 cannot tell from none."""


@dataclass(frozen=True)
class Meant:
    """The answers of a module and a hash of each tensor: the record that stays once the module is gone.

    Without answers it is of a module that was never whole in memory.
    """

    answers: Sequence[Tensor]
    tensors: Mapping[str, str]


def meant(model: Model, module: Module) -> Meant:
    """The record of an open module. Hashes come first: bitsandbytes repacks weights for an answer."""
    hashes = hashed(module.state_dict())
    return Meant(model.probe(module), hashes)


def reopened(saved: Meant, artifact: Artifact, device: str, tolerance: float = 0.0) -> Artifact:
    """The artifact, if the module opened from disk equals the record. Raises `LlmqError` with the first difference."""
    with artifact.open(device) as loaded:
        state = loaded.module.state_dict()
        opened = meant(artifact.model, loaded.module) if saved.answers else Meant((), hashed(state, passing=True))
    names = [*saved.tensors, *(opened.tensors.keys() - saved.tensors.keys())]
    other = next((name for name in names if saved.tensors.get(name) != opened.tensors.get(name)), None)
    away = _apart(saved.answers, opened.answers)
    if other or not away <= tolerance:  # not >: NaN fails, too
        why = f"{other} differs" if other else f"its answers are apart by {away:.1e}, and no tensor is"
        place = str(artifact.adapter or artifact.weights)
        raise LlmqError(f"{artifact.history[-1]}: {place!r} does not hold the model that was to be saved: {why}")
    return artifact


def same_answers(
    answers: Sequence[Tensor], artifact: Artifact, device: str, form: Callable[[Module], object], tolerance: float
) -> Artifact:
    """The artifact, if the module opened from disk answers as the one that was saved, once `form` gave it its layers.

    Raises `LlmqError` if its answers are apart by more than `tolerance`.
    """
    with artifact.open(device) as loaded:
        form(loaded.module)
        away = _apart(answers, artifact.model.probe(loaded.module))
    if not away <= tolerance:  # not >: NaN fails, too
        place = str(artifact.weights)
        raise LlmqError(
            f"{artifact.history[-1]}: {place!r} answers apart by {away:.1e} from the model that was to be saved"
        )
    return artifact


def written(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise `LlmqError` unless a safetensors file holds these tensors, equal to the bit, and no other."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        for name, tensor in tensors.items():
            if name not in names or not _same_bits(opened.get_tensor(name), tensor):
                raise LlmqError(f"{str(file)!r}: {name} differs from the tensor to be written; is the disk sound?")
        if more := sorted(names - tensors.keys()):
            raise LlmqError(f"{str(file)!r} holds {more[0]}, which was not to be written")


class Start:
    """The weights to be trained and the answers of an open module, before a training."""

    def __init__(self, model: Model, module: Module):
        self.answers = model.probe(module)
        self.weights = {name: p.detach().cpu().clone() for name, p in _learning(module)}

    def moved(self, module: Module, after: Meant) -> dict[str, object]:
        """The notes on how far the weights have moved since, with a finding where nothing changed."""
        pairs = [(self.weights[name], p.detach().cpu()) for name, p in _learning(module)]
        # In float64: `LEAST` is at the limit of float32.
        apart = sum(float((now.double() - was.double()).square().sum()) for was, now in pairs)
        norm = sum(float(was.double().square().sum()) for was, _ in pairs)
        share = (apart / norm) ** 0.5 if norm else float(apart > 0)  # from weights of zeros any move counts whole
        same = all(_same_bits(a, b) for a, b in zip(self.answers, after.answers, strict=True))
        notes: dict[str, object] = {"weights_moved_by": float(f"{share:.3g}")}
        if share < LEAST or same:
            moved = f"its weights moved by {share:.1e} of their norm"
            why = "the model answers to the bit as before" if same else moved
            notes["finding"] = f"training changed nothing: {why}"
        return notes


def _learning(module: Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b.cpu()))


def _bytes(tensor: Tensor) -> Tensor:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # equal bits, NaN and -0 as well


def hashed(state: Mapping[str, object], passing: bool = False) -> dict[str, str]:
    """A hash of each tensor by name; `passing` gives back the pages of the files that a tensor lies in, one by one."""
    import torch

    hashes = {}
    for name, t in state.items():
        if isinstance(t, torch.Tensor):
            hashes[name] = hashlib.sha256(_bytes(t.cpu()).numpy().data).hexdigest()
            resident.forget([t] if passing else [])
    return hashes


def _apart(answers: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest distance of an answer to the other, as a share of its norm."""
    return max((_distance(a, b) for a, b in zip(answers, others, strict=True)), default=0.0)


def _distance(saved: Tensor, opened: Tensor) -> float:
    """The norm of the difference, as a share of the norm of the answer; 0 for the same bits, infinite for NaN."""
    if _same_bits(saved, opened):
        return 0.0
    if saved.shape != opened.shape:
        return float("inf")
    apart = float((opened.double() - saved.double()).norm() / saved.double().norm().clamp_min(1e-30))
    return apart if apart == apart else float("inf")  # NaN is no distance
