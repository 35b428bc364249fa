"""What `quantize.gptq` and `quantize.rtn` share: the grid's settings, its checks, and the checkpoint they write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmq import __version__
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import write_json
from llmq.layers import Pattern, settings_of, skip_or
from llmq.models.skeleton import Skeleton
from llmq.quantize import gptq_format
from llmq.quantize.grid import Quantized, round_to_nearest

GROUP_SIZES = (128, 64, 32)


class Grid(BaseModel):
    """The grid that weights are rounded to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, -1] = Field(64, description="inputs that share a scale; -1: all of them")
    sym: bool = Field(True, description="the zero in the middle of the grid")
    mse: bool = Field(True, description="shrink each range to where the squared error is least")


class GridStep(Grid):
    """The settings of a step that writes the GPTQ format."""

    modules: dict[Pattern, Annotated[Literal["skip"] | Grid, skip_or(Grid)]] = Field(
        {}, description="by regular expression: {down_proj: {bits: 8}, lm_head: {bits: 4}, 'layers.0.': skip}"
    )

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for settings that the shapes of its layers do not allow."""
        self.grids(Skeleton.of(base))

    def grids(self, source: Skeleton) -> dict[str, Grid]:
        """The grid of each layer to be quantized. Raises `UserError` for one whose shape it cannot hold."""
        source.check_layers()
        linears = {name: layer for block in source.blocks for name, layer in source.linears(block).items()}
        grid = Grid(**{name: getattr(self, name) for name in Grid.model_fields})
        grids = settings_of(linears, source.head, grid, self.modules)
        if not grids:
            raise UserError("modules: skips every layer; leave one to quantize")
        for name, its in grids.items():
            check_shape(name, source.module.get_submodule(name), its)
        return grids


def check_shape(name: str, layer: Any, grid: Grid) -> None:
    """Raise `UserError` if a layer's shape cannot be quantized so, with what can."""
    inputs, outputs = layer.in_features, layer.out_features
    if grid.group_size > 0 and inputs % grid.group_size:
        can = [size for size in GROUP_SIZES if inputs % size == 0]
        cure = f"{' and '.join(map(str, can))} {'are' if len(can) > 1 else 'is'}" if can else "-1 takes the whole row"
        raise UserError(
            f"group_size {grid.group_size} of {name}: {inputs} is not divisible by {grid.group_size}; {cure}"
        )
    for count, side in ((inputs, "inputs"), (outputs, "outputs")):
        if count * grid.bits % 32:
            raise UserError(
                f"bits {grid.bits} of {name}: the GPTQ format packs {side} into words of 32 bits, and {count} × "
                f"{grid.bits} bits leave a part of one; leave it out with modules: {{{name.rpartition('.')[2]}: skip}}"
            )


class RoundToNearest:
    """The `Method` that rounds each layer's weights to its grid."""

    gathers: Literal["hessian", "squares"] | None = None

    def __init__(self, grids: Mapping[str, Grid]):
        self.grids = grids
        self.format = format_of(grids)

    def wants(self, layer: str) -> bool:
        """Whether it has a grid."""
        return layer in self.grids

    def change(self, layers: Mapping[str, Any], gathered: Any) -> dict[str, dict[str, Any]]:
        """The four tensors of each layer."""
        return {name: gptq_format.to_tensors(self.quantize(name, w.float()), self.format) for name, w in layers.items()}

    def quantize(self, layer: str, weight: Any) -> Quantized:
        """One matrix, by the grid of its layer."""
        grid = self.grids[layer]
        return round_to_nearest(weight, grid.bits, grid.group_size, grid.sym, grid.mse)

    def weight(self, layer: str, tensors: Mapping[str, Any]) -> Any:
        """The float matrix that the four tensors stand for."""
        return gptq_format.from_tensors(tensors, self.grids[layer].bits, self.format).weight()


def format_of(grids: Mapping[str, Grid]) -> str:
    """`gptq`, or `gptq_v2` where a zero point can matter: GPTQModel trusts only its own files with it in the former."""
    return "gptq" if all(grid.sym for grid in grids.values()) else "gptq_v2"


def write_config(source: Skeleton, folder: Path, grids: Mapping[str, Grid], step: GridStep, **settings: Any) -> None:
    """Everything beside the weights: configuration, `quantize_config.json`, tokenizer; then see that it all fits."""
    from llmq.models.hugging_face import load_causal_lm

    config = {
        **{name: getattr(step, name) for name in ("bits", "group_size", "sym")},
        **settings,
        "lm_head": source.head in grids,
        "quant_method": "gptq",
        "checkpoint_format": format_of(grids),
        "pack_dtype": "int32",
        "dynamic": dynamic(source, grids, step) or None,
        "meta": {"quantizer": [f"llmq:{__version__}"]},
    }
    write_json(folder / "quantize_config.json", config)
    source.copy_side_files(folder, quantization_config=config)
    load_causal_lm(folder, str(source.dtype).removeprefix("torch."), "meta")


def told(source: Skeleton, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """The notes on what was quantized: how many layers, and how much of the weights of all blocks they hold."""
    return {"quantized_layers": len(grids), "changed_share": round(source.share(grids), 4)}


def dynamic(source: Skeleton, grids: Mapping[str, Grid], step: GridStep) -> dict[str, dict[str, Any]]:
    """What differs from layer to layer, as GPTQModel and vLLM read it: `+:` overrides, `-:` leaves out."""
    found: dict[str, dict[str, Any]] = {}
    for name in (*(name for block in source.blocks for name in source.linears(block)), source.head):
        its = grids.get(name)
        pattern = source.file_name(name).replace(".", r"\.")
        if its is None and name != source.head:
            found[f"-:{pattern}$"] = {}
        elif its and (its.bits, its.group_size, its.sym) != (step.bits, step.group_size, step.sym):
            found[f"+:{pattern}$"] = {key: getattr(its, key) for key in ("bits", "group_size", "sym")}
    return found
