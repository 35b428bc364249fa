"""Whether a language model and its tokenizer belong together, and can do what is asked: seen before anything runs."""

from collections.abc import Mapping
from typing import Any

from llmq.errors import UserError
from llmq.needs import Needs

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What configurations call the number of positions."""
MARKS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Tokens that a tokenizer, or what uses it, puts beside those of a text."""


def check_fits(model: Any, tokenizer: Any, needs: Mapping[str, Needs] | None = None) -> dict[int, str]:
    """Raise `UserError` unless each token of a text has an embedding, and all steps and tasks get what they need.

    `model` may be without weights. Returns the placeholders: special tokens without an embedding that no text makes
    unless it names them, such as Gemma 3's `<image_soft_token>`.
    """
    placeholders = _without_embedding(model, tokenizer)
    limit = positions(model)
    for name, its in (needs or {}).items():
        if limit and its.tokens > limit:
            raise UserError(f"{name}: {its.setting} {its.tokens}: the model has {limit} positions; {limit} at most")
        if its.end_mark and tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
            raise UserError(
                f"{name}: the tokenizer of {tokenizer.name_or_path!r} has no token that ends a text and none that pads "
                "one; name an 'eos_token' in its tokenizer_config.json"
            )
    return placeholders


def positions(model: Any) -> int | None:
    """How many tokens a model takes at once, as its configuration says; None where nothing limits them.

    Learned positions end there (GPT-2, OPT), and so do tables that transformers makes once (GPT-J, CTRL, MPT). Rotary
    ones go on, to angles of no training, and what comes out is worth nothing, though nobody says so. ALiBi is made to
    go on: of a Falcon with ALiBi the number limits nothing, and BLOOM has none.
    """
    config = model.config.get_text_config()
    said = (getattr(config, name, None) for name in POSITIONS)
    limit = next((number for number in said if isinstance(number, int) and number > 0), None)
    if limit is None or getattr(config, "alibi", False):
        return None
    tables = [layer for name, layer in model.named_modules() if name.endswith("position_embeddings")]
    # RoBERTa counts positions from its padding token on.
    first = max((1 + layer.padding_idx for layer in tables if getattr(layer, "padding_idx", None)), default=0)
    return limit - first


def refuse_ids_beyond(model: Any, names: Mapping[int, str]) -> None:
    """Let a model say in one line that a text holds a token without an embedding, where torch would end in its depths.

    On a GPU that would be an assertion, after which no other work goes on.
    """
    rows = _rows(model)

    def look(layer: Any, args: tuple[Any, ...]) -> None:
        if args and args[0].numel() and (highest := int(args[0].max())) >= rows:
            name = repr(names.get(highest, highest))
            raise UserError(f"the text holds the token {name}, and the model has no embedding for it; take it out")

    model.get_input_embeddings().register_forward_pre_hook(look)


def _rows(model: Any) -> int:
    return len(model.get_input_embeddings().weight)  # an adapter's layer in its place has a weight too


def _without_embedding(model: Any, tokenizer: Any) -> dict[int, str]:
    """The placeholders. Raises `UserError` for other tokens without an embedding."""
    rows = _rows(model)
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not beyond:
        return {}
    marks = {tokenizer.special_tokens_map.get(name) for name in MARKS}
    template = str(tokenizer.chat_template or "")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    made = [t for i, t in sorted(beyond.items()) if i not in special or t in marks or t in template]
    if made:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has {max(beyond) + 1} tokens and the model {rows} "
            f"embeddings, none for {made[0]!r}; resize the embeddings of the model, or take the tokenizer that "
            "belongs to it"
        )
    return beyond
