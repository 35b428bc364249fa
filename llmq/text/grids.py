"""Rounding the layers of a model to grids, to nearest or by GPTQ, to the tensors of the GPTQ format."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmq.errors import UserError
from llmq.layers import LayerChange
from llmq.matrix import gptq_format
from llmq.matrix.gram import Kind
from llmq.matrix.grid import Quantized, round_to_nearest
from llmq.types import Settings

if TYPE_CHECKING:
    from torch import Tensor

    Eliminated = tuple[Tensor, float, Tensor | None]

GROUP_SIZES = (128, 64, 32)  # the cures that an error offers


class Grid(Settings):
    """The grid that weights are rounded to."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, -1] = Field(64, description="inputs that share a scale; -1: all of them")
    sym: bool | None = Field(None, description="the zero in the middle of the grid; if unset, at 4 and 8 bits")
    mse: bool = Field(True, description="shrink each range to where the squared error is least")

    @property
    def symmetric(self) -> bool:
        """True for a zero in the middle: kernels of 4 and 8 bits want it, and at 2 and 3 bits it costs too much."""
        return self.bits >= 4 if self.sym is None else self.sym


def check_shape(name: str, outputs: int, inputs: int, grid: Grid) -> None:
    """Raise `UserError` if the shape of a layer forbids the grid; the error names settings that the shape allows."""
    if grid.group_size > 0 and inputs % grid.group_size:
        can = [size for size in GROUP_SIZES if inputs % size == 0]
        cure = f"{' and '.join(map(str, can))} {'are' if len(can) > 1 else 'is'}" if can else "-1 takes the whole row"
        raise UserError(
            f"group_size {grid.group_size} of {name}: {inputs} is not divisible by {grid.group_size}; {cure}"
        )
    for count, side in ((inputs, "inputs"), (outputs, "outputs")):
        # qweight packs codes along the inputs, qzeros along the outputs.
        if count * grid.bits % 32:
            raise UserError(
                f"bits {grid.bits} of {name}: the GPTQ format packs {side} into words of 32 bits, and {count} × "
                f"{grid.bits} bits leave a part of one; leave it out with modules: {{{name.rpartition('.')[2]}: skip}}"
            )


class RoundToNearest(LayerChange[Grid]):
    """Each weight goes to the nearest point of the grid of the layer."""

    @property
    def format(self) -> str:
        """`gptq`, or with a grid that is not symmetric `gptq_v2`: GPTQModel reads others' zero points only there."""
        return "gptq" if all(grid.symmetric for grid in self.settings.values()) else "gptq_v2"

    def change(self, layers: "Mapping[str, Tensor]", total: "Tensor | None") -> "dict[str, dict[str, Tensor]]":
        """The four tensors of the GPTQ format for each layer."""
        rounded = self.rounded(layers, total)
        return {name: gptq_format.to_tensors(made, self.format) for name, made in rounded.items()}

    def rounded(self, layers: "Mapping[str, Tensor]", total: "Tensor | None") -> "dict[str, Quantized]":
        """Each layer `(outputs, inputs)` of a group on its grid; `total` is the sum over the inputs of the group."""
        made = {}
        for name, weight in layers.items():
            grid = self.settings[name]
            made[name] = round_to_nearest(weight.float(), grid.bits, grid.group_size, grid.symmetric, grid.mse)
        return made

    def weight(self, layer: str, tensors: "Mapping[str, Tensor]") -> "Tensor":
        """The float matrix `(outputs, inputs)` that the four tensors stand for."""
        return gptq_format.from_tensors(tensors, self.settings[layer].bits, self.format).weight()

    def bits(self, layer: str) -> int:
        return int(self.settings[layer].bits)

    def notes(self) -> dict[str, object]:
        """Notes on the calibration for the report."""
        return {}


class Gptq(RoundToNearest):
    """GPTQ: each weight goes to a point of the grid, and the inputs still to come compensate the error."""

    gathers: Kind | None = "hessian"  # `X^T X` over the calibration, (inputs, inputs)

    def __init__(
        self,
        grids: Mapping[str, Grid],
        damp_percent: float,
        desc_act: bool = True,
        static_groups: bool = True,
        keep_zeros: bool = False,
        by_loss: bool = False,
        sweeps: int = 0,
    ):
        super().__init__(grids, by_loss)
        self.sweeps = sweeps
        self.damp_percent, self.desc_act, self.static_groups = damp_percent, desc_act, static_groups
        self.keep_zeros = keep_zeros
        self.dampings: dict[str, float] = {}

    def rounded(self, layers: "Mapping[str, Tensor]", total: "Tensor | None") -> "dict[str, Quantized]":
        """Each layer on its grid; layers that share an input share one factorization of the Hessian."""
        assert total is not None
        eliminated = self.eliminated(total)
        damping = eliminated[1]
        # A group may be rounded several times, on trial: the last time counts.
        self.dampings = {name: d for name, d in self.dampings.items() if name not in layers}
        if damping != self.damp_percent:
            self.dampings |= dict.fromkeys(layers, damping)
        rounded: dict[str, Quantized] = {}
        for grid in dict.fromkeys(self.settings[name] for name in layers):
            those = {name: weight for name, weight in layers.items() if self.settings[name] == grid}
            rounded |= self.on_grid(those, grid, total, eliminated)
        return rounded

    def eliminated(self, total: "Tensor") -> "Eliminated":
        """What all grids share: the elimination of the inputs in order, the damping used, and the order."""
        from llmq.matrix.solver import elimination

        # `desc_act`: the inputs with the largest sum of squares first. (inputs,)
        order = total.diagonal().argsort(descending=True, stable=True) if self.desc_act else None
        return *elimination(total, self.damp_percent, order), order  # the first (inputs, inputs)

    def on_grid(
        self, layers: "Mapping[str, Tensor]", grid: Grid, total: "Tensor", eliminated: "Eliminated"
    ) -> "dict[str, Quantized]":
        """Layers on one grid, solved side by side: the time of a solution is the number of its inputs."""
        import torch

        from llmq.matrix.descent import descend
        from llmq.matrix.solver import solve

        upper, damping, order = eliminated
        side_by_side = torch.cat([*layers.values()]).float()  # (outputs of all, inputs)
        shape = grid.bits, grid.group_size, grid.symmetric, grid.mse
        made = solve(side_by_side, upper, *shape, order, self.static_groups, self.keep_zeros)
        made = descend(side_by_side, total, made, damping, self.sweeps, self.keep_zeros)
        parts = made.split([len(weight) for weight in layers.values()])  # by outputs
        return dict(zip(layers, parts, strict=True))

    def notes(self) -> dict[str, object]:
        """The dampings that had to be raised, by layer."""
        return {"damping": self.dampings}
