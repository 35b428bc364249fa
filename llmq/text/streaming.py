"""One text written token by token, by the likeliest token or by a draw under a seed.

The forward pass of the model is all that is needed: with the cache that it returns, or else over all tokens again.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from llmq.errors import LlmqError
from llmq.files import sha256_text
from llmq.text.attention import crosses
from llmq.text.generation import CACHES
from llmq.types import JsonObject

Pick = Callable[[Tensor], int]
"""A function from logits (vocabulary,) to the next token."""
NO_CHARACTER = "\ufffd"
"""What a tokenizer makes of the first bytes of a character."""


@dataclass(frozen=True)
class Sampling:
    """The way to choose a token: temperature 0 takes the likeliest, another draws among those of the share `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def picker(self, ids: Sequence[int], time: int = 0) -> Pick:
        """The choice for one text, which depends on the seed, the prompt and the `time` that it is asked, no others."""
        if not self.temperature:
            return lambda logits: int(logits.argmax())
        key = sha256_text(str(self.seed), " ".join(map(str, ids)), str(time))
        generator = torch.Generator().manual_seed(int(key[:15], 16))

        def draw(logits: Tensor) -> int:
            logits = logits.float().cpu()
            shares, order = ((logits - logits.max()) / self.temperature).softmax(-1).sort(descending=True, stable=True)
            before = shares.cumsum(-1) - shares  # the share of all likelier tokens
            kept = shares.where(before < self.top_p, 0.0)  # (vocabulary,)
            return int(order[torch.multinomial(kept, 1, generator=generator)])

        return draw


class Reader:
    """An open model with the text that it has read, and the cache of it."""

    def __init__(self, module: Any, device: str):
        self.module, self.device = module, device
        network = module.get_base_model() if hasattr(module, "get_base_model") else module
        self.known = inspect.signature(network.forward).parameters
        self._forget()

    def _forget(self) -> None:
        self.ids: list[int] = []
        self.cache: JsonObject = {}

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits (vocabulary,) after a text; what it has in common with the text before is not read again."""
        read = self._cut(ids)
        told: JsonObject = dict(self.cache)
        if "position_ids" in self.known:  # some hybrid models (Bamba) need to be told
            told["position_ids"] = torch.arange(read, len(ids), device=self.device)[None]  # (1, tokens)
        if "logits_to_keep" in self.known:
            told["logits_to_keep"] = 1
        self._forget()  # a pass that is interrupted leaves some layers of the cache longer than others
        with torch.inference_mode():
            new = torch.tensor([ids[read:]], device=self.device)  # (1, tokens)
            output = self.module(input_ids=new, use_cache=True, **told)
        kept = {name: getattr(output, name, None) for name in CACHES}
        self.ids, self.cache = list(ids), {name: cache for name, cache in kept.items() if cache is not None}
        last: Tensor = output.logits[0, -1]
        if not bool(last.isfinite().any()) or bool(last.isnan().any()):
            raise LlmqError("the model answers with numbers that are not finite")
        return last

    def _cut(self, ids: Sequence[int]) -> int:
        """Cut the cache to the tokens that `ids` begins with, and return their number; one token is left to read."""
        if self.ids and crosses(self.module, len(self.ids), len(ids)):  # the keys that are kept were turned otherwise
            self._forget()
        pairs = enumerate(zip(self.ids, ids[:-1], strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(self.ids), len(ids) - 1)) if self.cache else 0
        whole = same == len(self.ids)
        if _goes_on(self.cache, len(ids) - same) if whole else same and _shortened(self.cache, same):
            return same
        self._forget()
        return 0


def _goes_on(cache: JsonObject, tokens: int) -> bool:
    """True if so many tokens can follow; some recurrent layers (Mamba, Jamba) take several for the start of a text."""
    return tokens == 1 or all(getattr(states, "is_croppable", False) for states in cache.values())


def _shortened(cache: JsonObject, tokens: int) -> bool:
    """Shorten a cache of plain keys and values; False for any other, such as recurrent states or sliding windows."""
    states = cache.get("past_key_values")
    layers = getattr(states, "layers", ())  # a graph of OpenVINO shows none, and all of its own are plain
    if states is None or len(cache) > 1 or not states.is_croppable or any(type(x) is not DynamicLayer for x in layers):
        return False
    states.crop(tokens - states.get_seq_length())  # a negative number: from the end
    return True


def stream(reader: Reader, ids: Sequence[int], most: int, pick: Pick, ends: Collection[int]) -> Iterator[int]:
    """The tokens that follow a prompt, one by one: at most `most`, the last perhaps one of the end marks."""
    text = list(ids)
    for _ in range(most):
        token = pick(reader.logits(text))
        yield token
        if token in ends:
            return
        text.append(token)


def pieces(tokens: Iterator[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of tokens as it grows, in whole characters."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if text.startswith(shown) and not text.endswith(NO_CHARACTER) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    text = decode(ids)
    if text.startswith(shown) and text != shown:  # the answer ends within a character
        yield text[len(shown) :]
