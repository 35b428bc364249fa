"""The cost of each layer at each grid: the divergence that its rounding adds, foretold from the gradient of the loss.

For outputs off by `e` at one token the divergence rises by about half the sum of `(g e)²`, where `g` is the gradient of
the loss: Fisher's information in place of the curvature. One walk through the calibration rounds each layer on every
grid by GPTQ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmq.errors import UserError
from llmq.files import cache, sha256_files, sha256_texts, write_json
from llmq.guarded.files import read_json_object
from llmq.layers import LayerChange
from llmq.matrix import gptq_format
from llmq.matrix.gram import Kind
from llmq.terminal import say, track
from llmq.text.blockwise import WEIGHTS, Calibration, kept_weights, write
from llmq.text.end_check import corrections
from llmq.text.grids import Gptq, Grid, check_shape
from llmq.text.stage_bytes import bytes_dense, bytes_of_block, bytes_outside, bytes_packed

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.artifact import Artifact
    from llmq.text.family import LanguageModel
    from llmq.text.skeleton import Skeleton

FORMAT = "gptq_v2"
"""The format of layers that are kept for a check: any zero points."""
Costs = dict[str, list[float]]
"""By layer: the cost in nats a token on each of its grids."""


VERSION = 4
"""The version of the foretold costs; the cache keeps the tables of each apart."""
CHECKED = 4
"""Windows, a quarter of all at most, that rounding on trial does not see, and that costs are checked on.

On windows that GPTQ was calibrated on a layer errs less than on others: 3 bits foretold so were off by three times.
"""
TRIED = "rounded.partial"
"""The ending of the file of a block on the grids that are checked."""
MIDDLE = 4
"""The bits at which layers are set against one another."""
GRIDS = ((2, 32), (2, 64), (3, 32), (3, 64), (4, 32), (4, 64), (4, 128), (8, 64))
"""Bits and group sizes that each layer may have, or as many of them as its shape allows, or its float weights."""


@dataclass(frozen=True)
class Sizes:
    """Of each layer: the grids that it may have (None: none), and the bytes of each; the bytes of all the rest."""

    grids: Mapping[str, Sequence[Grid | None]]
    sizes: Mapping[str, Sequence[int]]
    rest: int
    weights: int
    blocks: Sequence[int]
    """The bytes of each block at the least."""

    @property
    def least(self) -> int:
        """The bytes of the smallest stage."""
        return self.rest + sum(map(min, self.sizes.values()))

    def least_without(self, blocks: int) -> int:
        """The bytes of the smallest stage after the largest `blocks` blocks were dropped."""
        return self.least - sum(sorted(self.blocks, reverse=True)[:blocks])


@dataclass(frozen=True)
class Table(Sizes):
    """Sizes, and of each layer the cost of each grid in nats a token."""

    costs: Mapping[str, Sequence[float]]
    lost: float = 0.0
    """The divergence from the base, in nats a token, of the model before its layers are rounded."""


class Calibrating(Protocol):
    """A `quantize.gptq`, as far as its calibration goes."""

    @property
    def damp_percent(self) -> float: ...

    @property
    def sym(self) -> bool | None: ...

    def windows(self, artifact: Artifact, seed: int) -> tuple[list[list[int]], dict[str, object]]: ...


class Trials(LayerChange[Grid]):
    """Rounds each layer on all of its grids, notes the costs, and leaves the layer as it was."""

    gathers: Kind | None = "hessian"

    def __init__(self, grids: Mapping[str, Sequence[Grid]], damp_percent: float):
        super().__init__({name: choices[0] for name, choices in grids.items()}, by_loss=True)
        self.grids, self.damp_percent = grids, damp_percent
        self.means: Mapping[str, float] = {}  # the mean weight of a token in each layer
        self.tokens = 0
        self.costs: dict[str, dict[Grid, float]] = {name: {} for name in grids}
        self.checked = {name: _checked(choices) for name, choices in grids.items()}
        self.kept: dict[str, Tensor] = {}  # each layer on its checked grids, packed

    def change(self, layers: Mapping[str, Tensor], total: Tensor | None) -> dict[str, dict[str, Tensor]]:
        assert total is not None
        gptq = Gptq({}, self.damp_percent)
        eliminated = gptq.eliminated(total)
        for grid in dict.fromkeys(grid for name in layers for grid in self.grids[name]):
            those = {name: weight for name, weight in layers.items() if grid in self.grids[name]}
            rounded = gptq.on_grid(those, grid, total, eliminated)
            for name, weight in those.items():
                if grid == self.checked[name].get(grid.bits):
                    packed = gptq_format.to_tensors(rounded[name], FORMAT)
                    self.kept |= {f"{grid.bits}.{name}.{part}": tensor for part, tensor in packed.items()}
                off = rounded[name].weight() - weight.float()  # (outputs, inputs)
                # total is the sum over tokens of w x xᵀ, the weights w of mean 1.
                harm = float(((off @ total) * off).sum())
                self.costs[name][grid] = self.means[name] * harm / self.tokens / 2
        return {name: {"weight": weight} for name, weight in layers.items()}

    def cost(self, layer: str, bits: int) -> float:
        """The cost of a layer on the grid that is checked for these bits, or for those nearest to 4 without one."""
        checked = self.checked[layer]
        return self.costs[layer][checked[bits] if bits in checked else checked[min(checked, key=_from_the_middle)]]


def sensitivities(
    source: Skeleton,
    grids: Mapping[str, Sequence[Grid]],
    windows: Sequence[Sequence[int]],
    damp_percent: float,
    folder: Path,
) -> Costs:
    """The cost of each layer on each of its grids, in their order; the tokens' weights are kept in `folder`."""
    import torch
    from safetensors import safe_open

    trials = Trials(grids, damp_percent)
    weights = kept_weights(source, folder, trials, windows, keep=True)
    seen, aside = _apart_from(windows)
    trials.tokens = sum(len(windows[i]) for i in seen)
    of_seen = {
        name: torch.cat([torch.split(weight, len(windows[0]))[i] for i in seen]) for name, weight in weights.items()
    }
    trials.means = {name: float(weight.double().mean()) for name, weight in of_seen.items()}
    calibration = Calibration(source, trials, [windows[i] for i in seen], True, of_seen)
    with torch.no_grad(), calibration.batches.started():
        for block in track(source.blocks, "sensitivity"):
            calibration.batches.enter(block)
            calibration.change_block(block)
            write(trials.kept, folder / f"{block}.{TRIED}")
            trials.kept = {}
        calibration.batches.enter("")

    def rounded(bits: int, layer: str) -> Tensor:
        block = next(block for block in source.blocks if layer.startswith(f"{block}."))
        with safe_open(folder / f"{block}.{TRIED}", "pt") as opened:
            names = opened.keys()
            at = bits if f"{bits}.{layer}.qweight" in names else min(trials.checked[layer], key=_from_the_middle)
            tensors = {part: opened.get_tensor(f"{at}.{layer}.{part}") for part in gptq_format.TENSORS}
        return gptq_format.from_tensors(tensors, at, FORMAT).weight()

    apart = type(source)(source.folder, source.dtype_name, source.device)
    every = sorted({bits for bits_checked in trials.checked.values() for bits in bits_checked})
    middle = min(every, key=_from_the_middle)
    costs = {bits: {name: trials.cost(name, bits) for name in grids} for bits in every}
    ways = {bits: partial(rounded, bits) for bits in every}
    factors = corrections(apart, ways, costs, middle, [windows[i] for i in aside])
    return {
        name: [factors[min(every, key=partial(_apart, grid.bits))][name] * trials.costs[name][grid] for grid in choices]
        for name, choices in grids.items()
    }


def _apart_from(windows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The numbers of the windows that are rounded by, and of those that costs are checked on, spread over all."""
    every = list(range(len(windows)))
    if len(every) == 1:
        return every, every
    aside = every[:: -(-len(every) // max(1, min(CHECKED, len(every) // 4)))]
    return [i for i in every if i not in aside], aside


def _checked(grids: Sequence[Grid]) -> dict[int, Grid]:
    """Of each number of bits up to 4, or of the fewest, the grid whose groups are nearest to 64 inputs."""
    few = [grid for grid in grids if grid.bits <= MIDDLE] or [min(grids, key=lambda grid: grid.bits)]
    nearest = sorted(few, key=lambda grid: -abs(grid.group_size - 64))
    return {int(grid.bits): grid for grid in nearest}


def _apart(bits: int, other: int) -> int:
    return abs(bits - other)


_from_the_middle = partial(_apart, MIDDLE)


def table_of(base: Artifact[LanguageModel], step: Calibrating, seed: int, device: str) -> Table:
    """The foretold costs of all grids for a model and the calibration of a `quantize.gptq`; kept in the cache."""
    source = base.model.skeleton(base, device)
    sizes = sizes_of(base, source, step.sym)
    grids = {name: [grid for grid in choices if grid] for name, choices in sizes.grids.items()}
    costs = _costs(base, source, grids, step, seed)
    return Table(**vars(sizes), costs={name: [*costs[name], 0.0] for name in grids})


def sizes_of(base: Artifact[LanguageModel], source: Skeleton, sym: bool | None) -> Sizes:
    """The bytes of a model, open as `source`, with each layer on each of its grids. Raises `UserError` without any."""
    source.check_layers()
    layers = [name for block in source.blocks for name in source.linears(block)]
    all_grids = [Grid(bits=bits, group_size=size, sym=sym) for bits, size in GRIDS]
    grids = {name: [grid for grid in all_grids if _fits(source, name, grid)] for name in layers}
    grids = {name: choices for name, choices in grids.items() if choices}
    if not grids:
        raise UserError(f"{base.model.weights!r}: no layer has a shape that a grid fits")
    sizes = {
        name: [*(bytes_packed(source, name, grid) for grid in choices), bytes_dense(source, name)]
        for name, choices in grids.items()
    }
    own = {block: bytes_of_block(source, block, list(grids)) for block in source.blocks}
    layers_in = {block: [name for name in source.linears(block) if name in grids] for block in source.blocks}
    return Sizes(
        {name: [*choices, None] for name, choices in grids.items()},
        sizes,
        bytes_outside(source) + sum(own.values()),
        sum(source.linear(name).weight.numel() for name in grids),
        [own[block] + sum(min(sizes[name]) for name in choices) for block, choices in layers_in.items()],
    )


def _fits(source: Skeleton, name: str, grid: Grid) -> bool:
    try:
        layer = source.linear(name)
        check_shape(name, layer.out_features, layer.in_features, grid)
    except UserError:
        return False
    return True


def _costs(
    base: Artifact[LanguageModel], source: Skeleton, grids: Mapping[str, Sequence[Grid]], step: Calibrating, seed: int
) -> dict[str, list[float]]:
    """The table in the cache, or one that is made now; its key is all that it depends on."""
    windows, _ = step.windows(base, seed)
    asked = {
        name: [(grid.bits, grid.group_size, grid.symmetric) for grid in choices] for name, choices in grids.items()
    }
    told = json.dumps([VERSION, source.dtype_name, step.damp_percent, asked, windows])
    key = sha256_texts([sha256_files([*base.weight_files(), base.weights / "config.json"]), told])[:16]
    folder = cache("search", key)
    file = folder / "costs.json"
    if file.is_file():
        say(f"  the costs of {len(grids)} layers are known: {file}")
        return {name: [float(cost) for cost in costs] for name, costs in read_json_object(file).items()}
    folder.mkdir(parents=True, exist_ok=True)
    costs = sensitivities(source, grids, windows, step.damp_percent, folder)
    write_json(file, costs)
    for used in (folder / WEIGHTS, *folder.glob(f"*.{TRIED}")):
        used.unlink()
    return costs
