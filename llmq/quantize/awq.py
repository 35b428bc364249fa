"""AWQ (Lin et al. 2023): inputs with large activations get a finer grid, by scales that the layer before takes back.

A column of a weight is multiplied by `s = mean|x| ** alpha` of its input before rounding, and the norm or linear layer
that feeds it is divided by `s`. Of 20 values of `alpha`, the search takes the one whose outputs on the calibration have
the least error as the `solver` rounds. A group of layers whose feeder is not found, or is read by others too, is
rounded without scales. Written in the GPTQ format.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmq.artifact import Artifact
from llmq.text.calibration import Calibrated
from llmq.text.family import LanguageModel
from llmq.text.grids import Gptq, Grid, RoundToNearest
from llmq.text.rounding import GridStep
from llmq.types import Context

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.sketch import Sketch, Work

ALPHAS = 20
ROWS = 256
"""Outputs of a layer that a candidate is tried on, evenly spread, or a few more: all choose little better, slowly."""
SMALLEST = 1e-4
"""The least mean activation, as a share of the mean of all inputs: a silent input would have a scale of 0."""


class Awq(GridStep, Calibrated):
    solver: Literal["nearest", "gptq"] = Field("nearest", description="the rounding of the scaled weights")
    damp_percent: float = Field(0.05, gt=0, lt=1, description="of the mean curvature, for solver: gptq")

    def check(self) -> None:
        super().check()
        if self.solver == "nearest":
            self.refuse_unread(("damp_percent",), "without solver: gptq")

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        return self.weighed(before, super().foresee(before))

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Calibrate, and write the quantized model to `folder`; a resumed run goes on after the last whole block."""

        def change(grids: Mapping[str, Grid]) -> RoundToNearest:
            if self.solver == "nearest":
                return _Nearest(grids, self.by_loss)
            return _Solved(grids, self.damp_percent, by_loss=self.by_loss)

        windows, calibration = self.windows(artifact, context.seed)
        settings = {"desc_act": False, "true_sequential": self.true_sequential}
        return self.write(artifact, folder, context, change, windows, settings, calibration=calibration)


class _Scaled(RoundToNearest):
    rescales = True

    def scales(self, layers: "Mapping[str, Tensor]", gram: "Tensor", magnitudes: "Tensor") -> "Tensor":
        """The scales `[inputs]` with the least error of the outputs, of 20 candidates; the first is 1 everywhere."""
        tried = {name: weight[:: max(1, len(weight) // ROWS)].float() for name, weight in layers.items()}
        means = (magnitudes / magnitudes.mean()).clamp_min(SMALLEST)  # (inputs,)
        candidates = (means ** (i / ALPHAS) for i in range(ALPHAS))
        # Dividing by the geometric mean of the extremes keeps scales around 1, as the authors do.
        return min((s / (s.max() * s.min()).sqrt() for s in candidates), key=partial(self._error, tried, gram))

    def _error(self, layers: "Mapping[str, Tensor]", gram: "Tensor", scales: "Tensor") -> float:
        # The solver itself is tried: scales that are best for nearest points can be worse than none for GPTQ.
        scaled = {name: weight * scales for name, weight in layers.items()}  # (outputs, inputs)
        rounded = self.rounded(scaled, gram / scales / scales.unsqueeze(1))  # of inputs x / s
        total = 0.0
        for name, weight in layers.items():
            off = rounded[name].weight() / scales - weight  # (outputs, inputs)
            total += float(((off @ gram) * off).sum())  # |off x|² summed over all inputs x of the calibration
        return total

    def notes(self) -> dict[str, object]:
        return {**super().notes(), "groups_without_scales": self.without_feeder}


class _Nearest(_Scaled):
    gathers = "squares"  # of no use to rounding, but they show the layers that no token of the calibration came to


class _Solved(_Scaled, Gptq):
    pass
