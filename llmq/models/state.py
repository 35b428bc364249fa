"""The weights of an image network on disk: `model.safetensors`, and `shapes.json` where channels were pruned."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.files import INDEX, at_home, entry_of, safetensors_of
from llmq.guarded import json_files

PICKLES = (".pth", ".pt")
SHOWN = 3
"""How many names of tensors an error shows."""


def check_weights(weights: str) -> None:
    """Raise `UserError` for a file or folder that is not there or is of no known kind."""
    path = at_home(weights)
    if path.is_dir():
        files_of(path)
    elif path.suffix not in (".safetensors", *PICKLES):
        raise UserError(f"{weights!r} is no folder and no .safetensors file")
    elif not path.is_file():
        raise UserError(f"there is no file {weights!r}")


def files_of(folder: Path) -> list[Path]:
    """The files of a folder's weights. Raises `UserError` if there is none, or one that the index names is missing."""
    files = safetensors_of(folder)
    if not files:
        raise UserError(f"{str(folder)!r} has no *.safetensors")
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{str(folder)!r} lacks {missing[0]!r}, which {INDEX} names")
    return files


def read_state(weights: str) -> dict[str, Any]:
    """The tensors of a file or folder by name; of a pickled file, tensors alone (`weights_only`)."""
    import torch

    path = at_home(weights)
    if path.suffix not in PICKLES:
        return _of_safetensors(path)
    found = read_pickle(path)
    inner = next((found[k] for k in ("state_dict", "model", "params") if isinstance(found.get(k), dict)), found)
    state = {n: t for n, t in inner.items() if isinstance(t, torch.Tensor) and isinstance(n, str)}
    if all(name.startswith("module.") for name in state):  # as DistributedDataParallel writes them
        return {name.removeprefix("module."): t for name, t in state.items()}
    return state


def read_pickle(path: Path) -> dict[Any, Any]:
    """What a pickled file holds, if that is tensors and plain values in a dict. Raises `UserError` otherwise."""
    import pickle

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{str(path)!r} holds more than tensors, or is broken: {why}") from None
    if not isinstance(found, dict):
        raise UserError(f"{str(path)!r} holds a {type(found).__name__}, and a dict of tensors by name is needed")
    return found


def _of_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    files = files_of(path) if path.is_dir() else [path]
    for file in files:
        try:
            found = load_file(file)
        except (SafetensorError, ValueError, KeyError) as error:  # the last two: empty, or of a dtype torch lacks
            raise UserError(f"{str(file)!r} is not a whole safetensors file: {error}") from None
        if twice := sorted(state.keys() & found.keys()):
            raise UserError(f"{str(path)!r} holds {some(twice)} in {file.name} and in another of its files")
        state |= found
    _check_index(path, files, state)
    return state


def _check_index(folder: Path, files: list[Path], state: Mapping[str, Any]) -> None:
    """Raise `UserError` if the index, where it is what names the files, tells of other tensors than they hold."""
    index = entry_of(folder)
    if index is None or index.suffix != ".json":
        return
    told = json_files.read_object(index)["weight_map"].keys()
    for names, problem in ((told - state.keys(), "names"), (state.keys() - told, "does not name")):
        if names:
            its = "no file holds" if problem == "names" else "its files hold"
            raise UserError(f"{str(index)!r} {problem} {some(sorted(names))}, which {its}")


def load_strictly(network: Any, state: Mapping[str, Any], source: str) -> None:
    """Give a network its tensors: all that it needs, nothing else, each of its shape and kind of number, all finite.

    What torch and the network's own modules take for equal is equal: older names, counters of batches that are not
    there. A buffer that the network computes itself may be in the file as well. Raises `UserError` that counts and
    names what is wrong.
    """
    own = network.state_dict()
    computed = {n: b for n, b in network.named_buffers() if n not in own}
    check_kinds(own | computed, state, source)
    given = {n: t for n, t in state.items() if n not in computed or computed[n].shape != t.shape}
    missing, left, shapes = _fitted(network, given, source)
    if missing or left or shapes:
        raise refused(source, missing, left, shapes)
    _check_one_value(own, state, source)
    if odd := not_finite(network.state_dict()):
        raise UserError(f"{source!r}: not finite numbers in {some(odd)}")


Shapes = list[tuple[str, tuple[int, ...], tuple[int, ...]]]
"""Names of tensors, with the shape that a file has and the shape that is needed."""


def _fitted(network: Any, given: Mapping[str, Any], source: str) -> tuple[list[str], list[str], Shapes]:
    """Load tensors; the names of those that are missing, left over, and of another shape."""
    try:
        missing, left = network.load_state_dict(given, strict=False)
    except RuntimeError as error:
        # torch tells of shapes by the names after its renaming, and of nothing else then.
        told = re.findall(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", str(error))
        others = {name: t for name, t in given.items() if name not in {name for name, _, _ in told}}
        if not told:
            raise UserError(f"{source!r} does not fit these settings: {' '.join(str(error).split())}") from None
        if len(others) == len(given):
            return [], [], _shapes(told)
        missing, left, more = _fitted(network, others, source)
        shapes = _shapes(told) + more
        return [name for name in missing if name not in {name for name, _, _ in shapes}], left, shapes
    return missing, left, []


def _shapes(told: Sequence[tuple[str, str, str]]) -> Shapes:
    return [(name, tuple(json.loads(there)), tuple(json.loads(here))) for name, there, here in told]


def refused(source: str, missing: Sequence[str], left: Sequence[str], shapes: Shapes) -> UserError:
    """The error of tensors that do not fit: those that are missing, left over, of another shape (there, here)."""
    told = []
    if missing:
        told.append(f" lacks {some(missing)}; is it of this architecture?")
    if left:
        told.append(f" holds {some(left)}, which these settings have no place for")
    if shapes:
        name, there, here = shapes[0]
        rest = f"; so are others: {some([n for n, _, _ in shapes])}" if len(shapes) > 1 else ""
        told.append(f": {name!r} is {there}, and these settings make it {here}{rest}")
    return UserError(f"{source!r}{' It'.join(told)}")


def some(names: Sequence[str]) -> str:
    """The first names of tensors, and how many there are."""
    more = ", …" if len(names) > SHOWN else ""
    count = f" ({len(names)} tensors)" if len(names) > 1 else ""
    return ", ".join(map(repr, names[:SHOWN])) + more + count


def kind_of_number(tensor: Any) -> str:
    """`float` for what a weight may be stored in; the dtype's own name for any that needs scales or is no number."""
    import torch

    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return "float"
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return "int" if tensor.dtype in whole else str(tensor.dtype).removeprefix("torch.")


def check_kinds(own: Mapping[str, Any], state: Mapping[str, Any], source: str) -> None:
    """Raise `UserError` for whole numbers where weights belong, and the reverse.

    A name that the network has not may be an older one: its last part tells the kind.
    """
    leaves = {name.rpartition(".")[2]: kind_of_number(t) for name, t in own.items()}
    odd = []
    for name, tensor in state.items():
        needed = kind_of_number(own[name]) if name in own else leaves.get(name.rpartition(".")[2], "float")
        if kind_of_number(tensor) != needed:
            odd.append((name, str(tensor.dtype).removeprefix("torch."), needed))
    if odd:
        name, dtype, needed = odd[0]
        rest = f"; so are others: {some([n for n, _, _ in odd])}" if len(odd) > 1 else ""
        raise UserError(f"{source!r}: {name!r} is stored in {dtype}, and {needed} numbers are needed{rest}")


def _check_one_value(own: Mapping[str, Any], state: Mapping[str, Any], source: str) -> None:
    """Raise `UserError` for two tensors of the file that differ and are one in the network."""
    import torch

    firsts: dict[tuple[int, Any], str] = {}
    for name, tensor in own.items():
        first = firsts.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if first != name and {first, name} <= state.keys() and not torch.equal(state[first], state[name]):
            raise UserError(f"{source!r}: {first!r} and {name!r} differ, and are one tensor in this network")


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity."""
    import torch

    floats = ((name, t.detach()) for name, t in state.items() if t.is_floating_point() and t.numel())
    return [name for name, t in floats if not bool(torch.linalg.vector_norm(t, float("inf")).isfinite())]


def save_network(network: Any, folder: Path) -> None:
    """Write `model.safetensors`, and `shapes.json` if the network was reshaped."""
    from safetensors.torch import save_file

    from llmq.models.reopened import written

    state = {name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    written(state, folder / "model.safetensors")
    shapes = getattr(network, "reshaped", None)
    if shapes:
        (folder / "shapes.json").write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")


def open_network(network: Any, folder: Path) -> Any:
    """A fresh network with the shapes and the weights of a folder, strictly."""
    shapes = folder / "shapes.json"
    if shapes.exists():
        from llmq.models.shapes import reshape

        try:
            reshape(network, json_files.read(shapes))
        except (UserError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{str(shapes)!r} tells no shapes of this network: {error!r}") from None
    load_strictly(network, read_state(str(folder)), str(folder))
    return network
