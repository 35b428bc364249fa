"""Pruning of whole blocks."""

import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.calibration import Calibrated
from llmq.errors import UserError
from llmq.models.skeleton import Skeleton
from llmq.types import Context, Step


class Layers(Calibrated, Step):
    """Drops the blocks that change their input least (ShortGPT, Men et al. 2024): smaller and faster in proportion.

    Influence is 1 - the cosine of a token's hidden state before and after the block, mean over the calibration. The
    configuration stays one that plain transformers opens.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    drop: PositiveInt = Field(description="how many blocks go")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` if no block would be left."""
        self._checked(Skeleton.of(base))

    def _checked(self, source: Skeleton) -> Skeleton:
        blocks = len(source.blocks)
        if self.drop >= blocks:
            raise UserError(f"drop {self.drop}: the model has {blocks} blocks; drop {blocks - 1} at most")
        return source

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Measure the influence of each block, and write the model without the least of them to `folder`."""
        from llmq.blockwise import write, write_index

        source = self._checked(Skeleton.of(artifact, context.device))
        windows, calibration = self.windows(artifact, context.seed)
        influences = influence_of_blocks(source, windows)
        order = sorted(range(len(influences)), key=influences.__getitem__)
        dropped = sorted(order[: self.drop])
        kept = [i for i in range(len(influences)) if i not in dropped]
        files = [folder / f"model-{i:05}-of-{len(kept) + 1:05}.safetensors" for i in range(1, len(kept) + 2)]
        for new, (old, file) in enumerate(zip(kept, files, strict=False)):
            block, renamed = source.blocks[old], source.blocks[new]
            write(source.as_in_files(source.held(block, renamed)), file)
        write(source.as_in_files(dict(source.outside())), files[-1])
        write_index(files)
        source.copy_side_files(folder, **config_of(source, kept))
        check_blocks(source, kept, Skeleton.of(artifact.then(self, weights=folder)))
        sizes = [sum(p.numel() for p in source.module.get_submodule(b).parameters()) for b in source.blocks]
        notes = {
            "influences": [round(i, 6) for i in influences],
            "dropped": dropped,
            "changed_share": round(sum(sizes[i] for i in dropped) / sum(sizes), 4),
            "calibration": calibration,
        }
        return artifact.then(self, weights=folder, notes=notes)


def influence_of_blocks(source: Skeleton, windows: list[list[int]]) -> list[float]:
    """1 - the mean cosine between the input and the output of each block."""
    import torch

    from llmq.attention import tiled
    from llmq.blockwise import in_batches
    from llmq.terminal import track

    sums = [0.0] * len(source.blocks)
    source.load_outside()

    def hook(i: int) -> Any:
        def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[i] += float(torch.cosine_similarity(before.float(), after.float(), dim=-1).sum())

        return add

    for i, block in enumerate(source.blocks):
        source.load(block)
        source.module.get_submodule(block).register_forward_hook(hook(i), with_kwargs=True)
    with torch.inference_mode(), tiled(source.module):
        for batch in track(in_batches(windows), "influence of blocks"):
            source.module(input_ids=torch.tensor(batch, device=source.device), use_cache=False, logits_to_keep=1)
    tokens = sum(map(len, windows))
    for block, total in zip(source.blocks, sums, strict=True):
        if not isfinite(total):
            raise UserError(f"{block}: what it makes of the calibration is not finite; look at the model")
    return [1 - total / tokens for total in sums]


def config_of(source: Skeleton, kept: list[int]) -> dict[str, Any]:
    """What the configuration says otherwise of a model with only the `kept` blocks: their number, lists about them."""
    key = source.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    derived = {k for k in dir(type(source.config)) if isinstance(getattr(type(source.config), k), property)}
    said = {k: v for k, v in source.config.to_dict().items() if isinstance(v, list) and k not in derived}
    each = {k: [v[i] for i in kept] for k, v in said.items() if EACH.search(k) and len(v) == len(source.blocks)}
    places = {k: [kept.index(i) for i in v if i in kept] for k, v in said.items() if PLACES.search(k)}
    return {key: len(kept), **each, **places}


EACH = re.compile(r"_types?$|^no_rope_layers$")
"""Lists of a configuration with an entry for each block."""
PLACES = re.compile(r"_indices$|^mlp_only_layers$")
"""Lists of a configuration with the numbers of some blocks."""


def _attends(block: Any) -> bool:
    return any("attention" in type(module).__name__.lower() for module in block.modules())


def check_blocks(source: Skeleton, kept: list[int], written: Skeleton) -> None:
    """Raise `UserError` unless each block that a configuration now makes is of the kind that it takes the place of."""
    name = source.config.model_type
    if len(written.blocks) != len(kept):
        raise UserError(f"{name} does not take its number of blocks from its configuration")
    if getattr(source.config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(f"{name} scales attention by the number of the block, which dropping blocks would change")
    attend = [_attends(source.module.get_submodule(block)) for block in source.blocks]
    if any(attend) and not any(attend[i] for i in kept):
        raise UserError(f"drop: no block of attention would be left of {name}, and transformers does not run that")
    for new, old in enumerate(kept):
        if _kind(written.module.get_submodule(written.blocks[new])) != _kind(
            source.module.get_submodule(source.blocks[old])
        ):
            raise UserError(
                f"{name} makes another kind of block {new} than block {old} is, which would take its "
                "place (a configuration that counts kinds of blocks by their number); use another drop"
            )


def _kind(block: Any) -> dict[str, Any]:
    """The shapes of a block's parameters, and all that its modules say of themselves but their number."""
    kind: dict[str, Any] = {name: tuple(p.shape) for name, p in block.named_parameters()}
    for name, module in block.named_modules():
        said = {k: v for k, v in vars(module).items() if isinstance(v, str | bool | int | float) and k not in NUMBERS}
        kind[f"{name}."] = (type(module).__name__, {k: v for k, v in said.items() if not k.startswith("_")})
    return kind


NUMBERS = ("layer_idx", "layer_id", "block_idx", "training")
"""How blocks call their own number, and what differs by who opened them."""
