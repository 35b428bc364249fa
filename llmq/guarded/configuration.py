"""What `config.json` says of a network, held against the files before a network of that size is built."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.files import safetensors_of
from llmq.guarded import json_files, safetensors_files

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
SHARED = 200
"""Layers that a network may have whatever its files hold: a few families use one block again and again."""
WIDEST = 2**26
"""No count in a configuration is larger: vocabularies have 2^19 tokens, positions 2^24."""
COUNTS = ("size", "dim", "heads", "experts", "layers", "layer", "head", "embd", "inner", "positions", "groups", "rank")
"""Endings of the names of such counts."""


def check(folder: Path) -> dict[str, Any]:
    """The configuration of a folder. Raises `UserError` for more layers than its files can hold, or absurd sizes."""
    file = folder / "config.json"
    data = json_files.read_object(file)
    told = list(_numbers(data))
    for name, value in told:
        if name.rpartition("_")[2] in COUNTS and abs(value) > WIDEST:
            raise UserError(f"{str(file)!r}: {name} is {_short(value)}, and no network is so large ({WIDEST} at most)")
    layers = [(name, value) for name, value in told if name in LAYERS and value > SHARED]
    if layers:
        held = sum(len(safetensors_files.header(part)) for part in safetensors_of(folder))
        name, value = max(layers, key=lambda one: one[1])
        if value > held:
            raise UserError(f"{str(file)!r}: {name} is {_short(value)}, and the files beside it hold {held} tensors")
    return data


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) <= 30 else f"a number of {len(text)} digits"


def _numbers(data: Any) -> Iterator[tuple[str, float]]:
    """Every number of nested data under the name that it has."""
    parts = data.items() if isinstance(data, dict) else ()
    for name, value in parts:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield str(name), value
        else:
            yield from _numbers(value)
