"""A tokenizer as GGUF files hold one: tokens, types, merges or scores, the name of the splitting of texts, a template.

llmq writes byte-level BPE and the BPE of sentencepiece. Engines know the splitting of texts by a name; the regular
expressions of the tokenizer tell the name, so that none is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.guarded import gguf_files
from llmq.text.tokenizer import end_marks, marks_around
from llmq.types import JsonObject

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

SAMPLES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "def f(x):\n    return x * 3.14159  # 2024\n\n\n",
    "Größe, naïve café — “quotes”, 12345 and 北京 😀!",
    "\tTabs  and   spaces;WORDS.in(Mixed)[CASE]_42",
)
"""Texts that the tokenizer of a file must cut as the tokenizer of the model does."""
BYTE_LEVEL_NAMES = ("gpt-2", "smollm")
WRITTEN = ("NFC", "Prepend", "Replace")
"""Kinds of normalizers that change nothing beyond the form of accents, or write sentencepiece's spaces."""


def check_make(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Raise `UserError` for a tokenizer of another make than those that are written."""
    described = _described(tokenizer, place)
    model, byte_level = described["model"], _is_byte_level(described)
    if model["type"] != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise UserError(
            f"the tokenizer of {str(place)!r} is {model['type']}; as GGUF are written byte-level BPE and that of "
            "sentencepiece"
        )
    own = described.get("normalizer") or {"normalizers": []}
    for part in own.get("normalizers", [own]):
        if part["type"] not in WRITTEN or (part["type"] == "Replace" and part["content"] != "\u2581"):
            raise UserError(
                f"the tokenizer of {str(place)!r} rewrites texts before it cuts them ({json.dumps(part)[:100]}), and "
                "engines do not"
            )
    if byte_level:
        splitting(described, place)


def _is_byte_level(described: JsonObject) -> bool:
    return "ByteLevel" in json.dumps([described.get("pre_tokenizer"), described.get("decoder")])


def write(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, place: Path) -> None:
    """Write a tokenizer for a network of `rows` embeddings."""
    described = _described(tokenizer, place)
    model, byte_level = described["model"], _is_byte_level(described)
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    tokens, types = _tokens(tokenizer, rows, byte_level)
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(splitting(described, place) if byte_level else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if byte_level:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix("prepend" in json.dumps([described.get("normalizer"), described["pre_tokenizer"]])
                                    and not _never_prepends(described))  # fmt: skip
    _write_marks(writer, tokenizer, place)


def _described(tokenizer: PreTrainedTokenizerBase, place: Path) -> JsonObject:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer of {str(place)!r} runs in Python; save it as tokenizer.json first")
    described: JsonObject = json.loads(backend.to_str())
    return described


def _never_prepends(described: JsonObject) -> bool:
    pre = described.get("pre_tokenizer") or {}
    return bool(pre.get("prepend_scheme") == "never")


def splitting(described: JsonObject, place: Path) -> str:
    """The name that engines have for the way in which a byte-level tokenizer splits texts before it merges."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    pre = described["pre_tokenizer"] or {}
    parts = pre.get("pretokenizers", [pre])
    kinds = [part.get("type") for part in parts]
    own = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own:
        pattern = parts[0]["pattern"].get("Regex")
        same = [name for name, known in GGUF_PRE_TOKENIZER_SPLITS.items() if known == pattern]
        # Of names for one expression, that of the model that ignores merges of whole words, or the other one.
        whole = bool(described["model"].get("ignore_merges"))
        preferred = [name for name in same if name in (WHOLE_WORDS if whole else MERGED)]
        if preferred:
            return str(preferred[0])
    raise UserError(
        f"the tokenizer of {str(place)!r} splits texts by {json.dumps(pre)[:200]}, for which engines have no name that "
        f"is known here; known are {', '.join((*BYTE_LEVEL_NAMES, *MERGED, *WHOLE_WORDS))}"
    )


MERGED = ("qwen2", "qwen35", "gpt-4o", "dbrx")
WHOLE_WORDS = ("llama-bpe", "tekken")
"""Names of splittings, apart for tokenizers that take a whole word that is a token, whatever the merges say."""


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """The token and its type for each embedding; embeddings without a token get a name that no text makes."""
    from gguf import TokenType

    names = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(rows):
        token, kind = names.get(i), TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{i}]", TokenType.UNUSED
        elif i in added:
            kind = TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED
            # Engines look for such a token in the text itself, where a space is a space.
            token = token if added[i].special else token.replace("\u2581", " ")
        elif not byte_level and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        if not byte_level and i == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """The scores by which sentencepiece merges: a token scores less the number of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    last = float(len(merges))
    return [-float(ranks.get(token, last)) for token in tokens]


def ends_of(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """The tokens at which a model stops: that of its tokenizer first, then those of its generation settings."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *sorted(end_marks(folder))]))


def _write_marks(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokens with which texts begin and end, those that are put there by themselves, and the templates."""
    ids = dict(zip(gguf_files.ENDS, ends_of(tokenizer, folder), strict=False))
    ids |= {mark: getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "unk", "pad")}
    for mark, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{mark}_token_id")(number)
    before, after = marks_around(tokenizer)
    writer.add_add_bos_token(before[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(after[-1:] == [tokenizer.eos_token_id])
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        named = isinstance(template, dict)
        writer.add_chat_template([{"name": n, "template": t} for n, t in template.items()] if named else template)


def check(file: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first sample that transformers cuts otherwise with the tokenizer in a GGUF file; empty if there is none."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    for text in SAMPLES:
        if tokenizer(text).input_ids != again(text).input_ids:
            return text
    return ""
