"""The weights of an image network on disk: `model.safetensors`, and `shapes.json` where channels were pruned."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.files import safetensors_of

PICKLES = (".pth", ".pt")


def check_weights(weights: str) -> None:
    """Raise `UserError` for a file or folder that is not there or is of no known kind."""
    path = Path(weights).expanduser()
    if path.is_dir():
        if not safetensors_of(path):
            raise UserError(f"{weights!r} has no *.safetensors")
    elif path.suffix not in (".safetensors", *PICKLES):
        raise UserError(f"{weights!r} is no folder and no .safetensors file")
    elif not path.is_file():
        raise UserError(f"there is no file {weights!r}")


def read_state(weights: str) -> dict[str, Any]:
    """The tensors of a file or folder by name; of a pickled file, tensors alone (`weights_only`)."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(weights).expanduser()
    if path.suffix in PICKLES:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{weights!r} holds more than tensors, or is broken: {str(error).splitlines()[0]}"
            ) from None
        if not isinstance(found, dict):
            raise UserError(f"{weights!r} holds a {type(found).__name__}, and a dict of tensors by name is needed")
        inner = next((found[k] for k in ("state_dict", "model", "params") if isinstance(found.get(k), dict)), found)
        return {
            name.removeprefix("module."): t
            for name, t in inner.items()
            if isinstance(t, torch.Tensor) and isinstance(name, str)
        }
    state: dict[str, Any] = {}
    for file in safetensors_of(path) if path.is_dir() else [path]:
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{str(file)!r} is not a whole safetensors file: {error}") from None
    return state


def load_strictly(network: Any, state: Mapping[str, Any], source: str) -> None:
    """Give a network its tensors. Raises `UserError` for the first that is missing, left over, or of another shape."""
    own = network.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise UserError(f"{source!r} lacks {name!r}; is it of this architecture?")
        if tensor.shape != state[name].shape:
            there, here = tuple(state[name].shape), tuple(tensor.shape)
            raise UserError(f"{source!r}: {name!r} is {there}, and these settings make it {here}")
    if extra := sorted(set(state) - set(own)):
        raise UserError(f"{source!r} holds {extra[0]!r}, which these settings have no place for")
    network.load_state_dict(dict(state), strict=True)


def save_network(network: Any, folder: Path) -> None:
    """Write `model.safetensors`, and `shapes.json` if the network was reshaped."""
    from safetensors.torch import save_file

    state = {name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    shapes = getattr(network, "reshaped", None)
    if shapes:
        (folder / "shapes.json").write_text(json.dumps(shapes, indent=1) + "\n")


def open_network(network: Any, folder: Path) -> Any:
    """A fresh network with the shapes and the weights of a folder, strictly."""
    shapes = folder / "shapes.json"
    if shapes.exists():
        from llmq.models.shapes import reshape

        reshape(network, json.loads(shapes.read_text()))
    load_strictly(network, read_state(str(folder)), str(folder))
    return network
