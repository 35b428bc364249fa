"""The one way in which weights of language models are opened: what the files hold is compared with what is needed."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmq import trust
from llmq.errors import UserError
from llmq.files import FLOATS, safetensors_of
from llmq.guarded import json_files, safetensors_files
from llmq.guarded.files import library
from llmq.models import packed_parts, packed_values
from llmq.models.formats import check_code, quantization
from llmq.models.names import module_names
from llmq.models.packed_parts import Stored

SHOWN = 3
"""How many names of tensors an error shows."""


def causal_lm(place: Path, **options: Any) -> Any:
    """What transformers opens, every tensor of it out of the files and every tensor of the files in it.

    transformers fills what is missing with random numbers and only logs it. Raises `UserError` with the first names of
    tensors that are missing, left over, or of another shape or dtype.
    """
    from transformers import AutoModelForCausalLM

    # A gguf file is named by an option; transformers' own mapping has read it.
    held = {} if options.get("gguf_file") else stored_as(safetensors_of(place))
    packed = bool(held) and quantization(place) is not None
    if held:
        check_code(place)
    if packed:
        _check_packed(place, held)
    if held and options.get("quantization_config"):  # packed while they are opened, and no longer comparable
        check(place)
    try:
        module, said = AutoModelForCausalLM.from_pretrained(
            place,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust.remote_code(),
            **options,
        )
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        odd = _odd_shapes(held)
        raise UserError(f"{str(place)!r}: its tensors do not fit together: {_some(odd)}; copy it again") from None
    name = type(module).__name__
    shapes = [f"{k} {list(found)}, needed {list(needed)}" for k, found, needed in sorted(said["mismatched_keys"])]
    faults = {
        "lacks": sorted(said["missing_keys"]),
        "has more than is needed": sorted(set(said["unexpected_keys"]) - _zero_biases(held, said["unexpected_keys"])),
        "has other shapes": shapes,
        "has other numbers where weights belong": _wrong_dtypes(held, module, packed),
    }
    told = [f"{what} ({len(names)}): {_some(names)}" for what, names in faults.items() if names]
    if told:
        shown = Path(place, options.get("gguf_file", ""))
        raise UserError(f"{str(shown)!r} does not hold what {name} needs: it {'; it '.join(told)}")
    return module


def check(folder: Path) -> None:
    """Raise `UserError` unless a folder holds what its network needs; reads names, shapes and dtypes alone."""
    causal_lm(folder, device_map={"": "meta"}, use_safetensors=True)


def with_adapter(module: Any, folder: Path) -> Any:
    """A PEFT adapter on an open module, every tensor of the one file in the other. Raises `UserError` otherwise."""
    from peft import PeftModel, get_peft_model_state_dict

    _check_adapter(folder)
    try:
        adapted = PeftModel.from_pretrained(module, folder)
    except (RuntimeError, ValueError) as error:  # other shapes; modules that are not there
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{str(folder)!r} does not fit {type(module).__name__}: {first}") from None
    held = stored_as(safetensors_of(folder))
    # PEFT also stores embeddings and head, as they are, where an adapter touches them.
    needed, allowed = (get_peft_model_state_dict(adapted, save_embedding_layers=e).keys() for e in (False, True))
    missing, more = sorted(needed - held.keys()), sorted(held.keys() - allowed)
    whole = [name for name, its in held.items() if its.dtype not in FLOATS]
    faults = {"lacks": missing, "has more than is needed": more, "has other numbers where weights belong": whole}
    told = [f"{what} ({len(names)}): {_some(names)}" for what, names in faults.items() if names]
    if told:
        raise UserError(f"{str(folder)!r} does not hold the adapter that it describes: it {'; it '.join(told)}")
    return adapted


def _check_adapter(folder: Path) -> None:
    """Raise `UserError` unless an adapter is a LoRA that names no module to be imported: PEFT would run that one."""
    said = json_files.read_object(folder / "adapter_config.json")
    if said.get("peft_type") != "LORA":
        raise UserError(f"{str(folder)!r} is an adapter of type {said.get('peft_type')!r}; LORA is what is opened")
    if said.get("megatron_config"):
        named = said.get("megatron_core")
        raise UserError(f"{str(folder)!r}: megatron_config would import {named!r}; adapters of plain layers are opened")


def as_opened_in(dtype: Any, module: Any) -> None:
    """Give each stored tensor of an open module the numbers that it will be opened with again.

    `module.to(dtype)` would round what transformers keeps in float32, and rotary frequencies, which no file holds.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = type(module)._from_config(module.config, dtype=dtype).state_dict()
    kept = [re.compile(name.replace("*", ".*")) for name in module._get_dtype_plan(dtype)]
    for name, tensor in module.state_dict(keep_vars=True).items():
        whole = any(pattern.search(name) for pattern in kept)
        tensor.data = tensor.data.float() if whole else tensor.data.to(empty[name].dtype)


def stored_as(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor in safetensors files by its name."""
    found: dict[str, Stored] = {}
    for file in files:
        for name, its in safetensors_files.header(file).items():
            if name in found:
                raise UserError(f"{str(file.parent)!r} holds {name!r} in two files; keep the one that is right")
            found[name] = Stored(its.dtype, its.shape, file)
    return found


def without_weights(folder: Path) -> Any:
    """The network that a folder describes, without memory for its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    check_code(folder)
    with library(folder, "model folder"), init_empty_weights():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code())
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust.remote_code())


def _check_packed(folder: Path, held: Mapping[str, Stored]) -> None:
    """Raise `UserError` for packed layers whose parts are not there or do not fit, before native code sees them."""
    from transformers.pytorch_utils import Conv1D

    network = without_weights(folder)
    layers = {part for name in held for part in (name.rpartition(".")[0], name.partition(".weight")[0])}
    known = {name: tuple(p.shape) for name, p in network.named_parameters()}
    # (inputs, outputs) in the network, and (outputs, inputs) as every packed layer has it
    turned = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, Conv1D)}
    known |= {name: known[name][::-1] for name in turned}
    names = module_names(network, {f for f in layers if f})
    shapes = {f: known[f"{n}.weight"] for f, n in names.items() if len(known.get(f"{n}.weight", ())) == 2}
    amiss = list(packed_parts.faults(held, shapes)) or list(packed_values.faults(held))
    if amiss:
        raise UserError(f"{str(folder)!r} does not hold whole packed layers ({len(amiss)}): {_some(amiss)}")


def _wrong_dtypes(held: Mapping[str, Stored], module: Any, packed: bool) -> list[str]:
    """Tensors of whole numbers that were opened as parameters of floating point, under the module's names."""
    suspects = {name: its.dtype for name, its in held.items() if its.dtype not in FLOATS}
    if not suspects:
        return []
    names = module_names(module, {key.rpartition(".")[0] for key in suspects})
    opened = dict(module.named_parameters())
    wrong = []
    for key, dtype in suspects.items():
        owner, _, leaf = key.rpartition(".")
        parameter = opened.get(f"{names[owner]}.{leaf}")
        # Experts are stored apart and opened as one: a weight of theirs has the name of no parameter.
        apart = parameter is None and leaf == "weight" and not packed
        if apart or (parameter is not None and parameter.is_floating_point()):
            wrong.append(f"{key} {dtype}")
    return wrong


def _zero_biases(held: Mapping[str, Stored], names: Iterable[str]) -> set[str]:
    """Biases of nothing but zeros beside packed weights: AutoGPTQ wrote one for every layer that has none."""
    from safetensors import safe_open

    found = set()
    for name in names:
        if name.endswith(".bias") and name in held and f"{name.removesuffix('.bias')}.qweight" in held:
            with safe_open(held[name].file, "pt") as opened:
                if not opened.get_tensor(name).any():
                    found.add(name)
    return found


def _odd_shapes(held: Mapping[str, Stored]) -> list[str]:
    """Tensors that have another shape than most of their kind, their kind being the name without its numbers."""
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    for name, its in held.items():
        shapes.setdefault(re.sub(r"\d+", "#", name), Counter())[its.shape] += 1
    usual = {kind: found.most_common(1)[0][0] for kind, found in shapes.items()}
    odd = [f"{n} {list(its.shape)}" for n, its in held.items() if its.shape != usual[re.sub(r"\d+", "#", n)]]
    return odd or sorted(held)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
