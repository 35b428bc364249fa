"""Drops the blocks that change their input least (ShortGPT, Men et al. 2024): smaller and faster in proportion.

Influence is 1 - the cosine of a token's hidden state before and after the block, mean over the calibration. The
configuration stays one that plain transformers opens.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq import together
from llmq.artifact import Artifact
from llmq.environment import own_device
from llmq.errors import UserError
from llmq.text.calibration import Windowed
from llmq.text.family import LanguageModel
from llmq.text.skeleton import Skeleton
from llmq.types import Context

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.sketch import Sketch, Work
    from llmq.text.batches import Windows
    from llmq.types import Loaded

EACH = re.compile(r"_types?$|^no_rope_layers$")
"""Lists of a configuration with an entry for each block."""
PLACES = re.compile(r"_indices$|^mlp_only_layers$")
"""Lists of a configuration with the numbers of some blocks."""
NUMBERS = ("layer_idx", "layer_id", "block_idx", "training")
"""Attributes with the number of a block, or with a value that depends on who opened the block."""


class Layers(Windowed):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}
    in_every_process: ClassVar[bool] = True
    is_led: ClassVar[bool] = True

    drop: PositiveInt = Field(description="blocks to take out")

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The model without its last blocks, which are as large as those that go."""
        from dataclasses import replace

        from llmq.sketch import Work, times
        from llmq.text.sizing import work
        from llmq.text.sizing.network import as_text

        source = as_text(before)
        gone = tuple(f"{block}." for block in source.blocks[len(source.blocks) - self.drop :])
        kept = tuple(part for part in source.parts if not part.name.startswith(gone))
        made = replace(source, parts=kept, blocks=source.blocks[: -self.drop])
        rows = max(1, work.BATCH_TOKENS // self.length)
        passes = times(work.forward(source, rows, self.length, 1), self.samples / rows)
        return made, passes.plus(work.opening(source)).plus(Work(0, {"copy": 6.0 * made.in_memory}, work.PROBES))

    def check_base(self, base: Artifact[LanguageModel]) -> None:
        """Raise `UserError` if no block would be left."""
        self._skeleton(base, "cpu")

    def _skeleton(self, artifact: Artifact[LanguageModel], device: str) -> Skeleton:
        source = artifact.model.skeleton(artifact, device)
        blocks = len(source.blocks)
        if self.drop >= blocks:
            raise UserError(f"drop {self.drop}: the model has {blocks} blocks; drop {blocks - 1} at most")
        return source

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Measure the influence of each block, and write the model without the least influential ones to `folder`."""
        from llmq.text.blockwise import finish, shards, write

        source = self._skeleton(artifact, context.device)
        windows, calibration = self.windows(artifact, context.seed)
        influences = influence_of_blocks(source, windows)
        order = sorted(range(len(influences)), key=influences.__getitem__)  # least influence first
        dropped = sorted(order[: self.drop])
        kept = [i for i in range(len(influences)) if i not in dropped]
        files = shards(folder, len(kept) + 1)  # the last one for everything outside the blocks
        for new, (old, file) in enumerate(zip(kept, files, strict=False)):
            block, renamed = source.blocks[old], source.blocks[new]  # kept blocks are numbered anew
            write(source.as_in_files(source.held(block, renamed)), file)
        write(source.as_in_files(dict(source.outside())), files[-1])
        finish(source, files, **config_of(source, kept))
        check_blocks(source, kept, Skeleton(folder, source.dtype_name))
        sizes = [sum(p.numel() for p in source.module.get_submodule(b).parameters()) for b in source.blocks]
        notes = {
            "influences": [round(i, 6) for i in influences],
            "dropped": dropped,
            "changed_share": round(sum(sizes[i] for i in dropped) / sum(sizes), 4),
            "calibration": calibration,
        }
        return artifact.then(self, weights=folder, notes=notes)


def influence_of_blocks(source: Skeleton, windows: list[list[int]]) -> list[float]:
    """1 - the mean cosine of input and output, for each block. Raises `UserError` for outputs that are not finite."""
    from llmq.text.blockwise import in_batches

    batches = in_batches(windows)
    work = partial(_share_of_cosines, source.folder, source.dtype_name, source.device, batches)
    sums = [0.0] * len(source.blocks)
    for cosines in together.answers_of(work, [], partial(_cosines, source, batches)):
        for i, each in enumerate(cosines):
            sums[i] += each
    tokens = sum(map(len, windows))
    for block, total in zip(source.blocks, sums, strict=True):
        if not isfinite(total):
            raise UserError(f"{block}: its outputs for the calibration are not finite numbers; look at the model")
    return [1 - total / tokens for total in sums]


def _share_of_cosines(
    folder: Path,
    dtype: str,
    device: str,
    batches: "Sequence[Windows]",
    models: "Sequence[Loaded]",
    share: together.Share,
) -> dict[int, list[float]]:
    return _cosines(Skeleton(folder, dtype, own_device(device)), batches, share)


def _cosines(source: Skeleton, batches: "Sequence[Windows]", share: together.Share) -> dict[int, list[float]]:
    """The summed cosines of a share of the batches, of each block."""
    import torch

    from llmq.terminal import track
    from llmq.text.attention import tiled

    sums: list[float] = []
    source.load_outside()

    def add(
        module: "Module",
        args: "tuple[Tensor, ...]",
        kwargs: "dict[str, Tensor]",
        output: "Tensor | tuple[Tensor, ...]",
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]  # (rows, tokens, d), as is the output
        after = output[0] if isinstance(output, tuple) else output
        # (rows, tokens), in float32: in bfloat16 cosines near 1 would round to 1.
        sums.append(float(torch.cosine_similarity(before.float(), after.float(), dim=-1).sum()))

    for block in source.blocks:
        source.load(block)
        source.module.get_submodule(block).register_forward_hook(add, with_kwargs=True)
    found: dict[int, list[float]] = {}
    with torch.inference_mode(), tiled(source.module):
        for i in track(list(share.of(range(len(batches)))), "influence of blocks"):
            sums.clear()
            # (rows, tokens); one logit each, as only the blocks are of interest.
            source.module(input_ids=torch.tensor(batches[i], device=source.device), use_cache=False, logits_to_keep=1)
            found[i] = list(sums)
    return found


def config_of(source: Skeleton, kept: list[int]) -> dict[str, object]:
    """The entries of the configuration that change with only the `kept` blocks: their number, lists about blocks."""
    key = source.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    # Lists that the configuration computes from others follow by themselves.
    derived = {k for k in dir(type(source.config)) if isinstance(getattr(type(source.config), k), property)}
    said = {k: v for k, v in source.config.to_dict().items() if isinstance(v, list) and k not in derived}
    each = {k: [v[i] for i in kept] for k, v in said.items() if EACH.search(k) and len(v) == len(source.blocks)}
    places = {k: [kept.index(i) for i in v if i in kept] for k, v in said.items() if PLACES.search(k)}
    return {key: len(kept), **each, **places}


def check_blocks(source: Skeleton, kept: list[int], written: Skeleton) -> None:
    """Raise `UserError` unless each block of the new configuration is of the kind of the old block in that place."""
    name = source.config.model_type
    if len(written.blocks) != len(kept):
        raise UserError(f"{name} does not take its number of blocks from its configuration")
    if getattr(source.config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(f"{name} scales attention by the number of the block, which dropping blocks would change")
    blocks = [source.module.get_submodule(block) for block in source.blocks]
    attend = [any("attention" in type(module).__name__.lower() for module in block.modules()) for block in blocks]
    if any(attend) and not any(attend[i] for i in kept):
        raise UserError(f"drop: no block of attention would be left of {name}, and transformers does not run that")
    for new, old in enumerate(kept):
        if _kind(written.module.get_submodule(written.blocks[new])) != _kind(blocks[old]):
            raise UserError(
                f"{name} makes another kind of block {new} than block {old} is, which would take its "
                "place (a configuration that counts kinds of blocks by their number); use another drop"
            )


def _kind(block: "Module") -> dict[str, object]:
    """The shapes of the parameters of a block, and all plain attributes of the modules but numbers of blocks."""
    kind: dict[str, object] = {name: tuple(p.shape) for name, p in block.named_parameters()}
    for name, module in block.named_modules():
        said = {k: v for k, v in vars(module).items() if isinstance(v, str | bool | int | float) and k not in NUMBERS}
        kind[f"{name}."] = (type(module).__name__, {k: v for k, v in said.items() if not k.startswith("_")})
    return kind
