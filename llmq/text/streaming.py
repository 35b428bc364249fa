"""One text written token by token, by the likeliest token or by a draw under a seed.

The forward pass of the model is all that is needed: with the cache that it returns, or else over all tokens again.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.files import sha256_text
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


class _Reader:
    """A model in the middle of a text, with the cache of what it has read."""

    def __init__(self, module: Any, device: str):
        self.module, self.device = module, device
        network = module.get_base_model() if hasattr(module, "get_base_model") else module
        self.known = inspect.signature(network.forward).parameters
        self.ids: list[int] = []
        self.cache: JsonObject = {}

    def logits(self, new: Sequence[int]) -> Tensor:
        """The logits (vocabulary,) after further tokens."""
        read = len(self.ids) if self.cache else 0
        self.ids += new
        told: JsonObject = dict(self.cache)
        if "position_ids" in self.known:  # some hybrid models (Bamba) need to be told
            told["position_ids"] = torch.arange(read, len(self.ids), device=self.device)[None]  # (1, tokens)
        if "logits_to_keep" in self.known:
            told["logits_to_keep"] = 1
        with torch.inference_mode():
            ids = torch.tensor([self.ids[read:]], device=self.device)  # (1, tokens)
            output = self.module(input_ids=ids, use_cache=True, **told)
        kept = {name: getattr(output, name, None) for name in CACHES}
        self.cache = {name: cache for name, cache in kept.items() if cache is not None}
        last: Tensor = output.logits[0, -1]
        if not bool(last.isfinite().any()) or bool(last.isnan().any()):
            raise LlmqError("the model answers with numbers that are not finite")
        return last


def stream(module: Any, ids: Sequence[int], most: int, pick: Pick, ends: Collection[int], device: str) -> Iterator[int]:
    """The tokens that follow a prompt, one by one: at most `most`, the last perhaps one of the end marks."""
    reader, new = _Reader(module, device), list(ids)
    for _ in range(most):
        token = pick(reader.logits(new))
        yield token
        if token in ends:
            return
        new = [token]


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
