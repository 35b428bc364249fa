"""Pruning of whole blocks."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.calibration import Calibrated, check_length
from llmq.errors import UserError
from llmq.models.skeleton import Skeleton
from llmq.types import Artifact, Context, Step


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
        check_length(self, self._checked(Skeleton.of(base)))

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
            tensors = source.module.get_submodule(block).named_parameters(prefix=renamed)
            write(source.as_in_files({name: tensor.data for name, tensor in tensors}), file)
        write(source.as_in_files(dict(source.outside())), files[-1])
        write_index(files)
        source.copy_side_files(folder, **config_of(source, kept))
        if len(Skeleton.of(artifact.then(self, weights=folder)).blocks) != len(kept):
            raise UserError(f"{source.config.model_type} does not take its number of blocks from its configuration")
        notes = {"influences": [round(i, 6) for i in influences], "dropped": dropped, "calibration": calibration}
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
    """What the configuration says otherwise of a model with only the `kept` blocks: their number, lists of them."""
    count = len(source.blocks)
    key = source.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    lists = {k: v for k, v in source.config.to_dict().items() if isinstance(v, list) and len(v) == count}
    return {key: len(kept), **{k: [v[i] for i in kept] for k, v in lists.items()}}
