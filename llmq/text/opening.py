"""The one way to open a language model: the tensors of the files are compared with those of the network."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmq import trust
from llmq.errors import UserError
from llmq.guarded import weights
from llmq.guarded.files import library, read_json_object
from llmq.guarded.weights import FLOATS, safetensors_of
from llmq.matrix.gptq_format import ZERO_OFFSETS
from llmq.text import packed_tensors
from llmq.text.formats import COMPRESSED, check_code, quantization
from llmq.text.names import module_names
from llmq.text.packed_tensors import Stored

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

SHOWN = 3
"""The number of tensor names that an error shows."""


def load_causal_lm(folder: Path, dtype: str, device: str, **options: object) -> PreTrainedModel:
    """A causal language model on `device`, in evaluation mode, packed layers ready for use."""
    import torch

    from llmq.environment import MEDIUM, large_blocks_apart
    from llmq.text.bnb_layers import as_opened

    config = _config_of_packed(folder, device)
    if config is not None:
        options["config"] = config
    options |= {"dtype": getattr(torch, dtype), "device_map": {"": device}, "use_safetensors": True}
    # A layer is packed by way of copies; those in the heap would lie between packed layers and hold them apart.
    with large_blocks_apart(MEDIUM):
        module = causal_lm(folder, **options)
    as_opened(module)
    return module.eval()


def _config_of_packed(folder: Path, device: str) -> PretrainedConfig | None:
    """The configuration that makes transformers open a folder with our packed layers; None for any other folder.

    On a GPU transformers opens a GPTQ folder with the faster kernels of GPTQModel, where GPTQModel is installed.
    Raises `UserError` for a format of packing that llmq does not read.
    """
    from transformers import AutoConfig

    check_code(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code())
    settings = quantization(folder) or {}
    method = settings.get("quant_method")
    # transformers opens GPTQModel's kernels through optimum alone.
    installed = all(map(importlib.util.find_spec, ("gptqmodel", "optimum")))
    faster = method == "gptq" and device != "cpu" and installed
    if method not in ("gptq", COMPRESSED) or faster:
        return None
    stored = settings.get("checkpoint_format", "gptq")
    if stored not in ZERO_OFFSETS:
        raise UserError(f"{str(folder)!r} is packed as {stored!r}; llmq opens {' and '.join(ZERO_OFFSETS)}")
    from llmq.text.packed import METHOD

    config.quantization_config = {**settings, "quant_method": METHOD, "packed_by": method}
    return config


def causal_lm(place: Path, **options: object) -> PreTrainedModel:
    """The model that transformers opens, with every tensor from the files and every tensor of the files.

    transformers fills missing tensors with random numbers and only logs their names. Raises `UserError` with the first
    names of tensors that are missing, left over, or of another shape or dtype.
    """
    from transformers import AutoModelForCausalLM

    # A gguf file is named by an option; transformers' own mapping has read it.
    held = {} if options.get("gguf_file") else stored_as(safetensors_of(place))
    packed = bool(held) and quantization(place) is not None
    if held:
        check_code(place)
    if packed:
        check_packed(place, held)
    if held and options.get("quantization_config"):  # packed while they are opened, and no longer comparable
        check(place)
    try:
        module, info = AutoModelForCausalLM.from_pretrained(
            place,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `info` lists them all; an error would not
            trust_remote_code=trust.remote_code(),
            **options,
        )
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        odd = _odd_shapes(held)
        raise UserError(f"{str(place)!r}: its tensors do not fit together: {_some(odd)}; copy it again") from None
    unexpected = info["unexpected_keys"]
    faults = {
        "lacks": sorted(info["missing_keys"]),
        "has more than is needed": sorted(set(unexpected) - _zero_biases(held, unexpected)),
        "has other shapes": [f"{k} {list(is_)}, needed {list(n)}" for k, is_, n in sorted(info["mismatched_keys"])],
        "has other numbers where weights belong": _wrong_dtypes(held, module, packed),
    }
    if told := _told(faults):
        shown = Path(place, str(options.get("gguf_file", "")))
        raise UserError(f"{str(shown)!r} does not fit {type(module).__name__}: {told}")
    return module


def check(folder: Path) -> None:
    """Raise `UserError` unless a folder holds the tensors of its network; only names, shapes and dtypes are read."""
    causal_lm(folder, device_map={"": "meta"}, use_safetensors=True)  # no memory for weights


def with_adapter(module: PreTrainedModel, folder: Path) -> PeftModel:
    """The open module with a PEFT adapter. Raises `UserError` unless adapter and files have the same tensors."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    from llmq.text.pooled import check_pools, let_pool

    _check_adapter(folder)
    try:
        config = LoraConfig.from_pretrained(folder)
        if config.use_qalora:
            let_pool(config)
        adapted = PeftModel.from_pretrained(module, folder, config=config)
        if config.use_qalora:
            check_pools(adapted)
    except (RuntimeError, ValueError) as error:  # other shapes; modules that are not there
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{str(folder)!r} does not fit {type(module).__name__}: {first}") from None
    held = stored_as(safetensors_of(folder))
    # PEFT also stores embeddings and head, as they are, where an adapter touches them.
    needed, allowed = (get_peft_model_state_dict(adapted, save_embedding_layers=e).keys() for e in (False, True))
    faults = {
        "lacks": sorted(needed - held.keys()),
        "has more than is needed": sorted(held.keys() - allowed),
        "has other numbers where weights belong": [name for name, tensor in held.items() if tensor.dtype not in FLOATS],
    }
    if told := _told(faults):
        raise UserError(f"{str(folder)!r} does not hold the adapter that it describes: {told}")
    return adapted


def _check_adapter(folder: Path) -> None:
    """Raise `UserError` unless an adapter is a LoRA that names no module to import: PEFT would run that module."""
    config = read_json_object(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{str(folder)!r} is an adapter of type {config.get('peft_type')!r}; llmq opens LORA")
    if config.get("megatron_config"):
        named = config.get("megatron_core")
        raise UserError(f"{str(folder)!r}: megatron_config would import {named!r}; adapters of plain layers are opened")


def as_opened_in(dtype: torch.dtype, module: PreTrainedModel) -> None:
    """Give each stored tensor of an open module the dtype in which transformers opens the saved tensor.

    `module.to(dtype)` would also round tensors that transformers keeps in float32, and rotary frequencies, which no
    file holds.
    """
    dtypes = dtypes_as_opened(dtype, module)
    for name, tensor in module.state_dict(keep_vars=True).items():  # the parameters themselves, not copies
        tensor.data = tensor.data.to(dtypes[name])


def dtypes_as_opened(dtype: torch.dtype, module: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype in which transformers opens each stored tensor of a model."""
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = type(module)._from_config(module.config, dtype=dtype).state_dict()  # each dtype as opened
    # Patterns of the names that transformers keeps in float32.
    kept = [re.compile(name.replace("*", ".*")) for name in module._get_dtype_plan(dtype)]
    return {n: torch.float32 if any(p.search(n) for p in kept) else tensor.dtype for n, tensor in empty.items()}


def stored_as(files: Iterable[Path]) -> dict[str, Stored]:
    """The header entry of every tensor in safetensors files, by name. Raises `UserError` for a name in two files."""
    held: dict[str, Stored] = {}
    for file in files:
        for name, entry in weights.header(file).items():
            if name in held:
                raise UserError(f"{str(file.parent)!r} holds {name!r} in two files; keep the one that is right")
            held[name] = Stored(entry.dtype, entry.shape, file)
    return held


def without_weights(folder: Path) -> PreTrainedModel:
    """The network that a folder describes, without memory for its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    check_code(folder)
    with library(folder, "model folder"), init_empty_weights():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code())
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust.remote_code())


def check_packed(folder: Path, held: Mapping[str, Stored]) -> None:
    """Raise `UserError` for packed layers with parts that are missing or do not fit, before native code reads them."""
    from transformers.pytorch_utils import Conv1D

    network = without_weights(folder)
    # The layer `a` of GPTQ's `a.qweight`, and of bitsandbytes' `a.weight.absmax`.
    layers = {part for name in held for part in (name.rpartition(".")[0], name.partition(".weight")[0])}
    known = {name: tuple(p.shape) for name, p in network.named_parameters()}
    # (inputs, outputs) in the network, and (outputs, inputs) as every packed layer has it
    turned = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, Conv1D)}
    known |= {name: known[name][::-1] for name in turned}
    names = module_names(network, {layer for layer in layers if layer})
    # Name of a layer in the files -> (outputs, inputs).
    shapes = {f: known[f"{n}.weight"] for f, n in names.items() if len(known.get(f"{n}.weight", ())) == 2}
    # Values are read only where all parts fit.
    faults = list(packed_tensors.faults_of_parts(held, shapes)) or list(packed_tensors.faults_of_values(held))
    if faults:
        raise UserError(f"{str(folder)!r} does not hold whole packed layers ({len(faults)}): {_some(faults)}")


def _wrong_dtypes(held: Mapping[str, Stored], module: PreTrainedModel, packed: bool) -> list[str]:
    """The stored tensors of whole numbers that were opened as floating-point parameters, each with the stored dtype."""
    suspects = {name: tensor.dtype for name, tensor in held.items() if tensor.dtype not in FLOATS}
    names = module_names(module, {key.rpartition(".")[0] for key in suspects}) if suspects else {}
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
    """The biases of zeros beside packed weights: AutoGPTQ wrote one for every layer without a bias."""
    from safetensors import safe_open

    zeros = set()
    for name in names:
        if name.endswith(".bias") and name in held and f"{name.removesuffix('.bias')}.qweight" in held:
            with safe_open(held[name].file, "pt") as opened:
                if not opened.get_tensor(name).any():
                    zeros.add(name)
    return zeros


def _odd_shapes(held: Mapping[str, Stored]) -> list[str]:
    """The tensors whose shape differs from most of the same name, numbers aside; all tensors if none does."""
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    for name, tensor in held.items():
        shapes.setdefault(re.sub(r"\d+", "#", name), Counter())[tensor.shape] += 1
    usual = {kind: counts.most_common(1)[0][0] for kind, counts in shapes.items()}
    odd = [f"{n} {list(tensor.shape)}" for n, tensor in held.items() if tensor.shape != usual[re.sub(r"\d+", "#", n)]]
    return odd or sorted(held)


def _told(faults: Mapping[str, list[str]]) -> str:
    return "; ".join(f"it {fault} ({len(names)}): {_some(names)}" for fault, names in faults.items() if names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
