"""Changing a model block by block, with one block in memory.

The calibration batches go through the model in lockstep. Each is a forward pass of the model itself, suspended before
the layers that are about to change until all passes have come there; then the layers are changed, and the passes go on
through the changed layers. So the model runs once, whatever its architecture; a later layer sees the outputs of
changed earlier layers; and of a batch only its suspended pass stays in memory. A finished block is a file, from
which a killed job goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.files import LAYERS, cache, sha256_files, sha256_texts, write_json
from llmq.guarded.files import read_json_object
from llmq.guarded.weights import safetensors_of
from llmq.matrix.gram import Gram
from llmq.reopened import written
from llmq.terminal import track
from llmq.text.batches import Batches, Windows
from llmq.text.feeders import feeders_of
from llmq.text.loss_weights import loss_weights, of_mean_one
from llmq.text.opening import load_causal_lm

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor

    from llmq.layers import LayerChange
    from llmq.matrix.gram import Kind
    from llmq.text.skeleton import Skeleton

WEIGHTS = "loss_weights.partial"
"""The file of the weights of the tokens, for a job that was killed; gone once the model is written."""
BATCH_TOKENS = 512
"""Tokens of a calibration batch: more take more memory, and are no faster."""
FACTS = ".layers.json"
"""The ending of the file of facts beside that of a block, so that a killed job loses none."""


def rewrite(
    source: Skeleton,
    folder: Path,
    change: LayerChange[BaseModel],
    windows: Windows = (),
    sequential: bool = True,
    **configuration: object,
) -> list[str]:
    """Write `source` to `folder` with its layers changed, one safetensors file a block; finished files stay.

    `configuration` replaces entries of `config.json`. Returns the layers that no calibration token reached, such as
    those of a rare expert.
    """
    import torch

    files = shards(folder, len(source.blocks) + 1)  # the last is for all that lies outside the blocks
    weights = kept_weights(source, folder, change, windows) if change.by_loss else {}
    calibration = Calibration(source, change, windows, sequential, weights)
    with torch.no_grad(), calibration.batches.started():
        for block, file in zip(track(source.blocks, "blocks"), files, strict=False):
            calibration.batches.enter(block)
            if file.exists():
                calibration.go_through(block, file)
            else:
                write(source.as_in_files(calibration.change_block(block)), file, calibration.taken())
        calibration.batches.enter("")
        if not files[-1].exists():
            head = calibration.change_head()
            outside = dict(source.outside())
            if head:  # its matrix is its own now, so tensors tied to it are written out
                outside |= {name: outside[stored] for name, stored in source.tied.items()}
                del outside[f"{source.head}.weight"]
            write(source.as_in_files(outside | head), files[-1], calibration.taken())
    finish(source, files, **configuration)
    load_causal_lm(folder, source.dtype_name, "meta")  # raises an error for files that lack what the network needs
    (folder / WEIGHTS).unlink(missing_ok=True)
    return calibration.unseen


class Calibration:
    """The calibration batches on their way through a model; a layer is changed once all batches have reached it."""

    def __init__(
        self,
        source: Skeleton,
        change: LayerChange[BaseModel],
        windows: Windows,
        sequential: bool,
        weights: Mapping[str, Tensor],  # layer -> the weights of all tokens (tokens,)
    ):
        self.source, self.change, self.sequential, self.weights = source, change, sequential, weights
        self.batches = Batches(source, in_batches(windows) if change.gathers else [])
        self.unseen: list[str] = []
        self.facts: dict[str, dict[str, object]] = {}  # of the layers that are changed and not written yet
        self.known_groups: dict[tuple[str, ...], list[list[int]]] = {}  # by layer names in a block: blocks are alike

    def go_through(self, block: str, file: Path) -> None:
        """Let the passes go through a block that an earlier, killed job wrote to `file`."""
        changed = list(filter(self.change.wants, self.source.linears(block)))
        for layer in changed:
            if self.batches:
                self._set(layer, self.change.weight(layer, self.source.kept(layer, file)))
        if self.change.rescales:
            self.source.load_from(file, block, changed)
            self.batches.block_changed()
        self.batches.resume()

    def change_block(self, block: str) -> dict[str, Tensor]:
        """Change the layers of a loaded block, and let the passes go through the block. Returns all tensors to keep."""
        wanted = list(filter(self.change.wants, self.source.linears(block)))
        kept: dict[str, Tensor] = {}
        if not self.batches:  # no calibration: each layer by itself
            for layer in wanted:
                kept |= self._change([layer], None)
        elif wanted:
            groups = self._groups(block, wanted)
            if self.change.rescales:
                self._rescale(block, groups)
            for group, total in self._gather(groups):
                kept |= self._change(group, total)
        self.batches.resume()
        others = self.source.held(block).items()
        return {name: tensor for name, tensor in others if name.removesuffix(".weight") not in wanted} | kept

    def change_head(self) -> dict[str, Tensor]:
        """Change the output head if that is wanted; all batches wait before the head."""
        head = self.source.head
        if not self.change.wants(head):
            return {}
        total = next(self._gather([[head]]))[1] if self.batches else None
        return self._change([head], total)

    def taken(self) -> dict[str, dict[str, object]]:
        """The facts about the layers that changed since the last call."""
        facts, self.facts = self.facts, {}
        return facts

    def _groups(self, block: str, wanted: Sequence[str]) -> list[list[str]]:
        """Layers that get the same input, in the order that a rehearsal of one batch reaches them."""
        signature = tuple(layer.removeprefix(block) for layer in wanted)
        if signature not in self.known_groups:
            seen = self._seen()
            groups = [[wanted.index(layer) for layer in group if layer in wanted] for group in seen]
            missed = set(wanted).difference(*seen)
            if missed:
                name = min(missed)
                raise UserError(
                    f"{name} of {self.source.config.model_type} is not reached by the calibration, so its model reads "
                    f"the weight by itself; leave it out: modules: {{{name.rpartition('.')[2]}: skip}}"
                )
            self.known_groups[signature] = [group for group in groups if group]
        return [[wanted[i] for i in group] for group in self.known_groups[signature]]

    def _seen(self) -> list[list[str]]:
        seen: dict[tuple[object, ...], list[str]] = {}  # (address, shape, version) of an input -> layers
        alive = []

        def note(layer: str, inputs: Tensor) -> None:
            alive.append(inputs)  # or its memory might be used for the next one
            # An expert that no token comes to has an input without memory: then the tensor itself tells.
            place = inputs.data_ptr() if inputs.numel() else id(inputs)
            seen.setdefault((place, inputs.shape, inputs._version), []).append(layer)

        self.batches.rehearsed(note)
        return list(seen.values())

    def _gather(self, groups: Sequence[Sequence[str]]) -> Iterator[tuple[Sequence[str], Tensor]]:
        """Each group with the sum over its inputs: in turn as the passes reach the groups, or all on one rehearsal."""
        gathers = self.change.gathers
        sums = {group[0]: [Gram(gathers, self._weights(group))] for group in groups if gathers}
        if not self.sequential:
            self._sum(sums, rehearsed=True)
        for group in groups:
            if self.sequential:  # the group is changed before any batch goes through it
                self._sum({group[0]: sums[group[0]]}, rehearsed=False)
            total = sums.pop(group[0])[0].total()  # (inputs, inputs), or the diagonal (inputs,)
            self.unseen += group if not bool(total.any()) else ()
            yield group, total

    def _sum(self, sums: Mapping[str, Sequence[Gram]], rehearsed: bool) -> None:
        """Add the inputs of layers to their sums, batch by batch."""

        def add(layer: str, inputs: Tensor) -> None:
            for each in sums[layer]:
                each.add(inputs)

        self.batches.hear(sums.keys(), add, rehearsed)

    def _weights(self, group: Sequence[str]) -> Tensor | None:
        """The weights of the tokens in layers that share an input: the mean over these layers, each of mean 1."""
        if not self.weights:
            return None
        first, *others = (of_mean_one(self.weights[layer]) for layer in group)
        return sum(others, first) / len(group)  # (tokens,)

    def _rescale(self, block: str, groups: Sequence[Sequence[str]]) -> None:
        """Scale the inputs of each group whose feeder, the norm or layer before, can take the inverse."""
        feeders = feeders_of(self.source, block, groups, self._look)
        kinds: tuple[Kind, Kind] = "hessian", "magnitudes"
        sums = {group[0]: [Gram(kind, self._weights(group)) for kind in kinds] for group in groups}
        self._sum(sums, rehearsed=True)
        for group, feeder in zip(groups, feeders, strict=True):
            gram, magnitudes = (each.total() for each in sums.pop(group[0]))  # (inputs, inputs), (inputs,)
            if feeder is None or not bool(magnitudes.any()):
                self.change.without_feeder += 1
                continue
            weights = {layer: self.source.weight(layer) for layer in group}
            scales = feeder.divide(self.source, self.change.scales(weights, gram, magnitudes))  # (inputs,)
            for layer, weight in weights.items():
                self.source.set(f"{layer}.weight", (weight.float() * scales).to(weight.dtype))
        self.batches.block_changed()

    def _look(self) -> tuple[dict[str, Tensor], Tensor]:
        """The input of each linear layer on a rehearsal of one batch, and the output of the block."""
        inputs: dict[str, Tensor] = {}
        output = self.batches.rehearsed(inputs.__setitem__)
        return inputs, output[0] if isinstance(output, tuple) else output

    def _change(self, layers: Sequence[str], total: Tensor | None) -> dict[str, Tensor]:
        weights = {layer: self.source.linear(layer).weight.data for layer in layers}  # (outputs, inputs)
        for layer, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise UserError(f"{layer}: its weights are not finite numbers; look at the model")
        try:
            changed = self.change.change(weights, total)
        except UserError as error:
            raise UserError(f"{layers[0]}: {error}") from None
        for layer, tensors in changed.items():
            made = self.change.weight(layer, tensors)
            self.facts[layer] = self.change.facts(layer, weights[layer], made, total)
            if self.batches:
                self._set(layer, made)
        return {f"{layer}.{name}": tensor for layer, tensors in changed.items() for name, tensor in tensors.items()}

    def _set(self, layer: str, weight: Tensor) -> None:
        self.batches.set(f"{layer}.weight", weight.to(self.source.device, self.source.dtype).contiguous())


def kept_weights(
    source: Skeleton, folder: Path, change: LayerChange[BaseModel], windows: Windows, keep: bool = False
) -> dict[str, Tensor]:
    """The weights of all tokens in each layer to be changed, from a file in `folder` if there is one.

    `keep` leaves a copy in the cache, for other steps on the same model and windows.
    """
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.exists():
        layers = [*(name for block in source.blocks for name in source.linears(block)), source.head]
        wanted = list(filter(change.wants, layers))
        known = _in_cache(source, windows)
        weights = load_file(known) if known.is_file() else {}
        if not weights.keys() >= set(wanted):
            # `source` has weights of its own to come.
            apart = type(source)(source.folder, source.dtype_name, source.device)
            weights = loss_weights(apart, wanted, in_batches(windows))
        for place in (file, *([known] if keep else [])):
            place.parent.mkdir(parents=True, exist_ok=True)
            write(weights, place)
    return {layer: weights.to(source.device) for layer, weights in load_file(file).items()}


def _in_cache(source: Skeleton, windows: Windows) -> Path:
    """The place in the cache of the weights of the tokens of some windows."""
    files = sha256_files(safetensors_of(source.folder))
    return cache(
        "loss_weights",
        f"{sha256_texts([files, source.dtype_name, json.dumps([list(w) for w in windows])])[:16]}.safetensors",
    )


def in_batches(windows: Windows) -> list[Windows]:
    """Windows, all of one length, in batches of at most `BATCH_TOKENS`, or of one window."""
    rows = max(1, BATCH_TOKENS // len(windows[0]))
    return [windows[i : i + rows] for i in range(0, len(windows), rows)]


def shards(folder: Path, count: int) -> list[Path]:
    """The safetensors files of a model in `count` files, named as transformers names them."""
    return [folder / f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write(tensors: Mapping[str, Tensor], file: Path, facts: Mapping[str, object] | None = None) -> None:
    """Write a safetensors file, with facts about its layers; under its final name the file is always whole."""
    from safetensors.torch import save_file

    partial_file = file.with_name(f".{file.name}.partial")
    if facts:  # the head of the file holds entries in an order that varies, so only one
        write_json(file.with_suffix(FACTS), facts)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial_file, {"format": "pt"})
    written(tensors, partial_file)
    partial_file.replace(file)


def finish(source: Skeleton, files: Sequence[Path], **configuration: object) -> None:
    """Write the rest of a model folder beside its safetensors files: index, facts, configuration, tokenizer."""
    write_index(files)
    gather_facts(files[0].parent, files)
    source.copy_side_files(files[0].parent, **configuration)


def write_index(files: Sequence[Path]) -> None:
    """Write the index that names the file of each tensor, beside the safetensors files of a model."""
    from safetensors import safe_open

    weight_map, total = {}, 0
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                weight_map[name] = file.name
                total += opened.get_tensor(name).nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(files[0].parent / "model.safetensors.index.json", index)


def gather_facts(folder: Path, files: Sequence[Path]) -> None:
    """Bring the facts that were kept beside the files of blocks into one file, block after block."""
    beside = [kept for file in files if (kept := file.with_suffix(FACTS)).is_file()]
    facts = read_json_object(folder / LAYERS) if (folder / LAYERS).is_file() else {}  # of a job killed right here
    for kept in beside:
        facts |= read_json_object(kept)
    if facts:
        write_json(folder / LAYERS, facts)
    for kept in beside:
        kept.unlink()
