"""The tokenizer of a model folder, and the check, before anything runs, that tokenizer and model belong together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmq import trust
from llmq.errors import UserError
from llmq.guarded.files import read_json_object

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmq.types import Needs

FILES = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "*.tiktoken", "chat_template*", "additional_chat_templates/*", "*.py",
]  # fmt: skip
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""The keys of configurations for the number of positions."""
MARKS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Tokens that a tokenizer or a user puts beside the tokens of a text."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, with a padding token. Raises `UserError` for files that make none."""
    from transformers import AutoTokenizer

    from llmq.guarded.templates import bound_chat_templates

    bound_chat_templates()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code())
    except Exception as error:  # noqa: BLE001  # tokenizers raises that very class
        settings = folder / "tokenizer_config.json"
        if settings.is_file() and read_json_object(settings).get("auto_map"):
            trust.need_remote_code(f"the tokenizer of {str(folder)!r} brings code of its own")
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer of {str(folder)!r} cannot be read: {reason}; copy its files again") from None
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(f"the tokenizer of {str(folder)!r}: model_max_length is {tokenizer.model_max_length!r:.80}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The mark that a tokenizer puts before every text (Llama), or nothing (SmolLM2)."""
    before, _ = marks_around(tokenizer)
    return before[:1] if before and before[0] == tokenizer.bos_token_id else []


def marks_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The marks that a tokenizer puts before and after every text; after it only with `add_eos_token`."""
    bare, whole = (list(tokenizer("a", add_special_tokens=marked)["input_ids"]) for marked in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
    return whole[:start], whole[start + len(bare) :]


def end_marks(folder: Path) -> frozenset[int]:
    """The tokens with which the model of a folder ends a text, by the generation settings or the configuration."""
    for name in ("generation_config.json", "config.json"):  # generation settings come first
        file = folder / name
        marks = read_json_object(file).get("eos_token_id") if file.is_file() else None
        if marks is not None:
            return frozenset(marks if isinstance(marks, list) else [marks])
    return frozenset()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer byte by byte: saved again, they would hold the settings of `load_tokenizer`."""
    for file in (file for pattern in FILES for file in source.glob(pattern)):
        target = folder / file.relative_to(source)
        # Code beside the new weights is that of the model, and stays.
        if file.is_file() and (file.suffix != ".py" or not target.exists()):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def check_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, needs: Mapping[str, Needs] | None = None
) -> dict[int, str]:
    """Raise `UserError` unless each token of a text has an embedding, and all steps and tasks get what they need.

    `model` may be without weights. Returns the placeholders: special tokens without an embedding that a text makes
    only by name, such as Gemma 3's `<image_soft_token>`.
    """
    placeholders = _without_embedding(model, tokenizer)
    limit = positions(model)
    for name, need in (needs or {}).items():
        if limit and need.tokens > limit:
            raise UserError(f"{name}: {need.setting} {need.tokens}: the model has {limit} positions; {limit} at most")
        if need.end_mark and tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
            raise UserError(
                f"{name}: the tokenizer of {tokenizer.name_or_path!r} has no token that ends a text and none that pads "
                "one; name an 'eos_token' in its tokenizer_config.json"
            )
    return placeholders


def positions(model: PreTrainedModel) -> int | None:
    """The number of tokens that a model takes at once, by the configuration; None without a limit.

    Learned positions end there (GPT-2, OPT), and so do tables that transformers makes once (GPT-J, CTRL, MPT). Rotary
    positions go on, to angles that were never trained, and give worthless output without a warning. ALiBi is made to
    go on: the configured number limits nothing in a Falcon with ALiBi, and BLOOM has none.
    """
    config = model.config.get_text_config()
    numbers = (getattr(config, name, None) for name in POSITIONS)
    limit = next((number for number in numbers if isinstance(number, int) and number > 0), None)
    if limit is None or getattr(config, "alibi", False):
        return None
    tables = [layer for name, layer in model.named_modules() if name.endswith("position_embeddings")]
    # RoBERTa counts positions from its padding token on.
    first = max((1 + layer.padding_idx for layer in tables if getattr(layer, "padding_idx", None)), default=0)
    return limit - first


def refuse_ids_beyond(model: PreTrainedModel, names: Mapping[int, str]) -> None:
    """Let a model raise `UserError` for a token without an embedding, where torch would fail deep inside.

    On a GPU torch fails by an assertion, after which no other work goes on.
    """
    rows = _rows(model)

    def look(layer: Module, args: tuple[Tensor, ...]) -> None:
        if args and args[0].numel() and (highest := int(args[0].max())) >= rows:
            name = repr(names.get(highest, highest))
            raise UserError(f"the text holds the token {name}, and the model has no embedding for it; take it out")

    model.get_input_embeddings().register_forward_pre_hook(look)


def _rows(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)  # an adapter's layer in its place has a weight too


def _without_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The placeholders. Raises `UserError` for other tokens without an embedding."""
    rows = _rows(model)
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}  # id -> token
    if not beyond:
        return {}
    marks = {tokenizer.special_tokens_map.get(name) for name in MARKS}
    template = str(tokenizer.chat_template or "")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # A text has no special token but those that tokenizer or template puts there.
    made = [t for i, t in sorted(beyond.items()) if i not in special or t in marks or t in template]
    if made:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has {max(beyond) + 1} tokens and the model {rows} "
            f"embeddings, none for {made[0]!r}; resize the embeddings of the model, or take the tokenizer that "
            "belongs to it"
        )
    return beyond
