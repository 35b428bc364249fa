"""The steps that round weights to a grid: their settings, their checks, and the GPTQ checkpoint that they write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmq import __version__
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import write_json
from llmq.layers import Pattern, settings_of, skip_or
from llmq.text import fused
from llmq.text.family import LanguageModel
from llmq.text.grids import Grid, RoundToNearest, check_shape
from llmq.text.skeleton import Skeleton
from llmq.types import Context, Step

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class GridStep(Grid, Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"packed": True}

    modules: dict[Pattern, Annotated[Literal["skip"] | Grid, skip_or(Grid)]] = Field(
        {},
        description="by pattern, a regular expression whose dots are those of names and whose numbers are whole: "
        "{down_proj: {bits: 8}, lm_head: {bits: 4}, layers.1: skip}",
    )

    def check_base(self, base: Artifact[LanguageModel]) -> None:
        """Raise `UserError` for settings that the shapes of the layers do not allow."""
        self.grids(base.model.skeleton(base, "cpu"))

    def grids(self, source: Skeleton) -> dict[str, Grid]:
        """The grid of each layer to be quantized. Raises `UserError` for a layer whose shape forbids the grid."""
        source.check_layers()
        linears = (name for block in source.blocks for name in source.linears(block))
        default = Grid(**{name: getattr(self, name) for name in Grid.model_fields})
        grids = settings_of(linears, source.head, default, self.modules)
        if not grids:
            raise UserError("modules: skips every layer; leave one to quantize")
        for name, grid in grids.items():
            layer = source.linear(name)
            check_shape(name, layer.out_features, layer.in_features, grid)
        return grids

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The layers on their grids; one block is in memory at a time, and the calibration of a step that has one."""
        from llmq.text.sizing.network import as_text
        from llmq.text.sizing.packing import gptq

        source = as_text(before)
        names = {part.name.removesuffix(".weight"): part for part in source.parts}
        head = source.head.removesuffix(".weight")
        linears = [part.name.removesuffix(".weight") for part in source.linears]
        default = Grid(**{name: getattr(self, name) for name in Grid.model_fields})
        grids = settings_of(linears, head, default, self.modules)
        for name, grid in grids.items():
            outputs, inputs = names[name].shape
            check_shape(name, outputs, inputs, grid)
        packed = {names[name].name: gptq(names[name], grid.bits, grid.group_size) for name, grid in grids.items()}
        made = source.with_parts(packed)
        if head in grids and source.head not in {part.name for part in source.parts if part.role == "head"}:
            # A tied head that is packed leaves the embeddings as they are.
            made = replace(made, parts=(*made.parts, names[head]))
        windows, length = self.calibration_windows
        return made, source.rewritten(made, packed, windows, length, gathers=True)

    def write(
        self,
        artifact: Artifact[LanguageModel],
        folder: Path,
        context: Context,
        change_to: Callable[[Mapping[str, Grid]], RoundToNearest],
        windows: Sequence[Sequence[int]] = (),
        settings: Mapping[str, object] = {},
        **notes: object,
    ) -> Artifact:
        """Write the quantized model to `folder`, with `settings` in the configuration and `notes` in the artifact."""
        from llmq.text.blockwise import rewrite

        source = artifact.model.skeleton(artifact, context.device)
        grids = self.grids(source)
        change, layers = change_to(grids), _told_of_each(source, grids)
        config = {
            **dict(_told(self)),
            **settings,
            "lm_head": source.head in grids,
            "quant_method": "gptq",
            "checkpoint_format": change.format,
            "pack_dtype": "int32",
            "dynamic": self._dynamic(layers) or None,
            "meta": {"quantizer": [f"llmq:{__version__}"]},
        }
        sequential = bool(settings.get("true_sequential", True))  # of no effect without calibration
        unseen = rewrite(source, folder, change, windows, sequential, quantization_config=config)
        write_json(folder / "quantize_config.json", config)  # where AutoGPTQ looks
        told = {"quantized_layers": len(grids), "changed_share": round(source.share(grids), 4)}
        more = {**change.notes(), "layers_without_calibration": len(unseen) or None} if windows else {}
        more |= {"finding": unlike} if (unlike := fused.finding(layers)) else {}
        return artifact.then(self, weights=folder, packed=True, notes={**told, **notes, **more})

    def _dynamic(self, told: "Mapping[str, Told]") -> dict[str, dict[str, object]]:
        """The entries of layers unlike the rest, as GPTQModel and vLLM read them: `+:` overrides, `-:` skips.

        Engines that fuse layers look for the name of the whole, which no file has: its parts speak for it.
        """
        different: dict[str, dict[str, object]] = {}
        for name, grid in (*told.items(), *fused.alike(told)):
            pattern = name.replace(".", r"\.")
            if not grid:
                different[f"-:{pattern}$"] = {}
            elif grid != _told(self):
                different[f"+:{pattern}$"] = dict(grid)
        return different


Told = tuple[tuple[str, object], ...]
"""A grid as the configurations of the format name it; empty for a layer that stays as it is."""


def _told(grid: Grid) -> Told:
    return ("bits", grid.bits), ("group_size", grid.group_size), ("sym", grid.symmetric)


def _told_of_each(source: Skeleton, grids: Mapping[str, Grid]) -> dict[str, Told]:
    """The grid of each linear layer, by its name in the files; `lm_head` speaks for a head that is not packed."""
    names = [name for block in source.blocks for name in source.linears(block)]
    names += [source.head] if source.head in grids else []
    return {source.file_name(name): _told(grids[name]) if name in grids else () for name in names}
