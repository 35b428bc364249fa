"""How far a training moved a model: one that moved nothing says so in the report."""

from collections.abc import Iterator
from typing import Any

from llmq.models.reopened import Meant, same_bits
from llmq.types import Model

LEAST = 1e-7
"""A change of the weights, as a share of their norm, that float32 cannot tell from none."""


class Start:
    """The weights that learn and the answers of an open module, as they are before a training."""

    def __init__(self, model: Model, module: Any):
        self.answers = model.probe(module)
        self.weights = {name: p.detach().cpu().clone() for name, p in _learning(module)}

    def moved(self, module: Any, after: Meant) -> dict[str, Any]:
        """The notes on how far the weights have moved since, with a finding where that is nowhere."""
        pairs = [(self.weights[name], p.detach().cpu()) for name, p in _learning(module)]
        apart = sum(float((now.double() - was.double()).square().sum()) for was, now in pairs)
        norm = sum(float(was.double().square().sum()) for was, _ in pairs)
        share = (apart / norm) ** 0.5 if norm else float(apart > 0)
        same = all(same_bits(a, b) for a, b in zip(self.answers, after.answers, strict=True))
        told: dict[str, Any] = {"weights_moved_by": float(f"{share:.3g}")}
        if share < LEAST or same:
            what = (
                "the model answers to the bit as before" if same else f"its weights moved by {share:.1e} of their norm"
            )
            told["finding"] = f"training changed nothing: {what}"
        return told


def _learning(module: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
