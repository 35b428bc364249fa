"""Each group of layers cut alone, at several ratios: what it saves, and how far it moves the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.matrix.allotment import allot
from llmq.prune.channels.cuts import Cut, figures, outputs, proven, take_out
from llmq.vision.likeness import in_order_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.vision.family import ImageModel

RATIOS = (0.25, 0.5, 0.75)
HALVINGS = 12
"""Steps towards the multiplications that are asked for, as those that two neighbours save are not a sum."""


@dataclass(frozen=True)
class Trials:
    """The cuts of each group by ratio, the first of them none, with costs and multiplications of each alone."""

    network: Module
    example: Tensor
    whole: int
    """The multiplications of the network as it is."""
    cuts: Sequence[Sequence[tuple[float, Cut | None]]]
    costs: Sequence[Sequence[float]]
    macs: Sequence[Sequence[int]]

    def counted(self, taken: Sequence[int]) -> int:
        """The multiplications of the network with the chosen cut of each group."""
        return _counted(self.network, self.example, [self.cuts[i][j][1] for i, j in enumerate(taken)])

    def within(self, budget: int) -> tuple[dict[str, float], int, float]:
        """The ratio of each layer, the multiplications, and the cost, of the choice that costs least.

        Raises `UserError` for a budget below what the largest ratios leave.
        """
        least = self.counted([len(each) - 1 for each in self.cuts])
        if least > budget:
            raise UserError(
                f"with {RATIOS[-1]:.0%} of every group gone {least / self.whole:.2f}x of the multiplications stay, and "
                f"{budget / self.whole:.2f}x is asked for"
            )
        low, high, best = 0.0, float(budget), [len(each) - 1 for each in self.cuts]
        aim = high
        for _ in range(HALVINGS):
            # Each size is that of the whole network with one cut: all but one whole are taken off.
            taken = allot(self.costs, self.macs, aim + (len(self.macs) - 1) * self.whole)
            if taken is not None and self.counted(taken) > budget:
                high = aim
            else:
                low, best = aim, best if taken is None else taken
            aim = (low + high) / 2
        ratios = {
            maker: ratio
            for (ratio, cut), group in zip((self.cuts[i][j] for i, j in enumerate(best)), self.cuts, strict=True)
            for maker in (cut or group[-1][1]).group.makers  # type: ignore[union-attr]
        }
        return ratios, self.counted(best), sum(self.costs[i][j] for i, j in enumerate(best))


def tried(network: Module, model: ImageModel, cuts: Mapping[float, Sequence[Cut]], inputs: Sequence[Tensor]) -> Trials:
    """The trials of all groups that some ratio of `cuts` cuts, on `inputs`; cuts that prove unsound are left out."""
    example = model.example(1)
    sound = {cut.group.makers for cut in proven(network, example, cuts[max(cuts)])}
    choices: dict[tuple[str, ...], list[tuple[float, Cut | None]]] = {}
    for ratio in sorted(cuts):
        for cut in cuts[ratio]:
            options = choices.setdefault(cut.group.makers, [(0.0, None)])
            if cut.group.makers in sound and (options[-1][1] is None or cut.gone != options[-1][1].gone):
                options.append((ratio, cut))
    groups = [options for options in choices.values() if len(options) > 1]
    truth = [_answers(network, x) for x in inputs]
    costs = [[_cost(network, model, cut, inputs, truth) for _, cut in options] for options in groups]
    macs = [[_counted(network, example, [cut]) for _, cut in options] for options in groups]
    return Trials(network, example, figures(network, example)["macs"], groups, costs, macs)


def _without(network: Module, cuts: Sequence[Cut | None]) -> Module:
    made = deepcopy(network)
    take_out(made, [cut for cut in cuts if cut])
    return made


def _counted(network: Module, example: Tensor, cuts: Sequence[Cut | None]) -> int:
    return figures(_without(network, cuts), example)["macs"]


def _answers(network: Module, inputs: Tensor) -> list[Tensor]:
    import torch

    with torch.inference_mode():
        return outputs(network, inputs)


def _cost(
    network: Module, model: ImageModel, cut: Cut | None, inputs: Sequence[Tensor], truth: Sequence[list[Tensor]]
) -> float:
    """The squared error of each output as a share of its variance, added up; the mean over inputs."""
    if cut is None:
        return 0.0
    smaller, total = _without(network, [cut]), 0.0
    for x, wanted in zip(inputs, truth, strict=True):
        made: Sequence[Tensor] = _answers(smaller, x)
        made = in_order_of(wanted, made) if model.unordered else made
        total += sum(
            float((a - b).square().mean() / b.var().clamp_min(1e-12)) for a, b in zip(made, wanted, strict=True)
        )
    return total / len(inputs)
