"""The weights of an image network on disk: `model.safetensors`, and `shapes.json` where channels were pruned."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.files import at_home
from llmq.guarded.files import read_json, read_json_object
from llmq.guarded.weights import INDEX, entry_of, safetensors_of
from llmq.terminal import say
from llmq.types import JsonObject

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    State = Mapping[str, Tensor]

PICKLES = (".pth", ".pt")  # opened as tensors alone
PLAIN = ("state_dict", "model", "params")
"""The keys under which training scripts keep the tensors."""
AVERAGED = ("state_dict_ema", "model_ema", "params_ema")
"""Those of timm, torchvision and BasicSR for means over the steps, which these evaluate where there are both."""
COUNTER = "n_averaged"
"""The number of the steps, which lies among the means of torchvision."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
SHOWN = 3
"""The most names of tensors that an error shows."""


def check_weights(weights: str) -> None:
    """Raise `UserError` for a file or folder that does not exist or is of no known kind."""
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


def read_state(weights: str) -> "dict[str, Tensor]":
    """The tensors of a file or folder by name; a pickled file may hold tensors and plain values alone."""
    import torch

    path = at_home(weights)
    if path.suffix not in PICKLES:
        return _of_safetensors(path)
    held = read_pickle(path)
    parts = [key for key in (*AVERAGED, *PLAIN) if isinstance(held.get(key), dict)]
    if len(parts) > 1 and parts[0] in AVERAGED:
        say(f"{weights}: holds {', '.join(parts)}; the averaged weights, {parts[0]}, are taken")
    inner = held[parts[0]] if parts else held
    state = {n: t for n, t in inner.items() if isinstance(t, torch.Tensor) and isinstance(n, str) and n != COUNTER}
    while state and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in state)), "")):
        state = {name.removeprefix(wrapper): t for name, t in state.items()}
    return state


def read_pickle(path: Path) -> JsonObject:
    """The dict in a pickled file of tensors and plain values. Raises `UserError` for a file with anything else."""
    import pickle

    import torch

    broken = pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file
    except broken as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if "Weights only" in why:  # torch then advises to run the code of the file
            why = "it may be a whole module; save its state_dict()"
        raise UserError(f"{str(path)!r} holds more than tensors, or is broken: {why}") from None
    if not isinstance(held, dict):
        raise UserError(f"{str(path)!r} holds a {type(held).__name__}, and a dict of tensors by name is needed")
    return held


def _of_safetensors(path: Path) -> "dict[str, Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    files = files_of(path) if path.is_dir() else [path]
    for file in files:
        try:
            tensors = load_file(file)
        except (SafetensorError, ValueError, KeyError) as error:  # the last two: empty, or of a dtype torch lacks
            raise UserError(f"{str(file)!r} is not a whole safetensors file: {error}") from None
        if twice := sorted(state.keys() & tensors.keys()):
            raise UserError(f"{str(path)!r} holds {some(twice)} in {file.name} and in another of its files")
        state |= tensors
    _check_index(path, state)
    return state


def _check_index(folder: Path, state: "State") -> None:
    """Raise `UserError` if an index of the files names other tensors than the files hold."""
    index = entry_of(folder)
    if index is None or index.suffix != ".json":  # no index
        return
    told = read_json_object(index)["weight_map"].keys()
    if unheld := sorted(told - state.keys()):
        raise UserError(f"{str(index)!r} names {some(unheld)}, which no file holds")
    if unnamed := sorted(state.keys() - told):
        raise UserError(f"{str(index)!r} does not name {some(unnamed)}, which its files hold")


def load_strictly(network: "Module", state: "State", source: str) -> None:
    """Load tensors into a network: all that it needs, no others, each of the right shape and kind, all finite.

    Names that the network's own modules bring up to date are right, and missing counters of batches are no fault. A
    buffer that the network computes may be in the file as well. Raises `UserError` that counts and names the faults.
    """
    own = network.state_dict()
    computed = {n: b for n, b in network.named_buffers() if n not in own}  # buffers that are not saved
    check_kinds(own | computed, state, source)
    given = {n: t for n, t in state.items() if n not in computed or computed[n].shape != t.shape}
    missing, left, shapes = _fitted(network, given, source)
    if missing or left or shapes:
        raise refused(source, missing, left, shapes)
    _check_one_value(own, state, source)
    if odd := not_finite(network.state_dict()):
        raise UserError(f"{source!r}: not finite numbers in {some(odd)}")


Shapes = list[tuple[str, tuple[int, ...], tuple[int, ...]]]
"""The names of tensors, each with the shape in the file and the shape that is needed."""


def _fitted(network: "Module", given: "State", source: str) -> tuple[list[str], list[str], Shapes]:
    """Load tensors. Returns the names of those that are missing, left over, and of another shape."""
    try:
        missing, left = network.load_state_dict(given, strict=False)
        return missing, left, []
    except RuntimeError as error:
        # torch then tells of shapes alone, by the names after renaming.
        told = re.findall(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", str(error))
        if not told:
            raise UserError(f"{source!r} does not fit these settings: {' '.join(str(error).split())}") from None
    shapes = [(name, tuple(json.loads(there)), tuple(json.loads(here))) for name, there, here in told]
    misfits = {name for name, _, _ in shapes}
    if not misfits & given.keys():  # renamed, so not to be left out by name
        return [], [], shapes
    missing, left, more = _fitted(network, {n: t for n, t in given.items() if n not in misfits}, source)
    shapes += more
    return [name for name in missing if name not in {name for name, _, _ in shapes}], left, shapes


def refused(source: str, missing: Sequence[str], left: Sequence[str], shapes: Shapes) -> UserError:
    """The error for tensors that do not fit: missing, left over, or of another shape (there, here)."""
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
    """The first names of tensors, and the number of all."""
    more = ", …" if len(names) > SHOWN else ""
    count = f" ({len(names)} tensors)" if len(names) > 1 else ""
    return ", ".join(map(repr, names[:SHOWN])) + more + count


def kind_of_number(tensor: "Tensor") -> str:
    """`float` or `int`, or the name of a dtype that needs scales or holds no numbers."""
    import torch

    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return "float"
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return "int" if tensor.dtype in whole else str(tensor.dtype).removeprefix("torch.")  # such as float8_e4m3fn


def check_kinds(own: "State", state: "State", source: str) -> None:
    """Raise `UserError` for whole numbers where weights belong, and the reverse.

    A name that the network lacks may be an older one: the last part of the name tells the kind.
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


def _check_one_value(own: "State", state: "State", source: str) -> None:
    """Raise `UserError` if two tensors differ in the file and are one tensor in the network."""
    import torch

    firsts: dict[tuple[int, torch.Size], str] = {}  # by address and shape
    for name, tensor in own.items():
        first = firsts.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if first != name and {first, name} <= state.keys() and not torch.equal(state[first], state[name]):
            raise UserError(f"{source!r}: {first!r} and {name!r} differ, and are one tensor in this network")


def not_finite(state: "State") -> list[str]:
    """The names of the tensors that hold a NaN or an infinity."""
    import torch

    # The largest absolute value is not finite if any number is not, NaN included.
    floats = ((name, t.detach()) for name, t in state.items() if t.is_floating_point() and t.numel())
    return [name for name, t in floats if not bool(torch.linalg.vector_norm(t, float("inf")).isfinite())]


def save_network(network: "Module", folder: Path) -> None:
    """Write `model.safetensors`, read it back, and write `shapes.json` if the network was reshaped."""
    from safetensors.torch import save_file

    from llmq.reopened import written

    # safetensors refuses tensors that share memory.
    state = {name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    written(state, folder / "model.safetensors")  # read back, bit by bit
    if shapes := getattr(network, "reshaped", None):
        (folder / "shapes.json").write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")


def open_network(network: "Module", folder: Path) -> "Module":
    """Give a fresh network the shapes and the weights of a folder, strictly."""
    shapes = folder / "shapes.json"
    if shapes.exists():
        from llmq.vision.shapes import reshape

        try:
            reshape(network, read_json(shapes))
        except (UserError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{str(shapes)!r} tells no shapes of this network: {error!r}") from None
    load_strictly(network, read_state(str(folder)), str(folder))
    return network
