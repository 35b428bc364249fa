"""The speed of a language model at generation: a prefill and a decode as units of work."""

import copy
import inspect
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from llmq.environment import where_it_runs
from llmq.types import Clock, Loaded, Reading

CACHES = ("past_key_values", "cache_params")
"""Names of the cache in a forward pass's arguments and outputs: of attention, and of state-space models."""


def clocks(loaded: Loaded, task: str, prompt_tokens: int, new_tokens: int, rounds: int) -> Iterable[Clock]:
    """Clocks for one forward pass over a prompt up to the first token, and for greedy decoding from the prompt's cache.

    One sequence at a time. A cache of keys and values is cut back after each decode; recurrent states cannot be cut, so
    each decode begins with a copy of them. Decoding is not timed for a model that returns no cache (RecurrentGemma).
    """
    vocabulary = loaded.module.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(loaded.device)  # (1, prompt_tokens)
    protocol = f"batch 1, {prompt_tokens}-token prompt, {where_it_runs(loaded)}"
    first = (
        Reading("time_to_first_token", "ms", "lower", lambda s: 1000 * s),
        Reading("prefill_tokens_per_second", "tokens/s", "higher", lambda s: prompt_tokens / s),
    )
    yield Clock(task, partial(_prefill, loaded.module, prompt), first, protocol, rounds=rounds)
    with torch.inference_mode():
        output = loaded.module(input_ids=prompt, use_cache=True)
    name = next((name for name in CACHES if getattr(output, name, None) is not None), None)
    if name is None:
        return
    cache = getattr(output, name)
    decode = (Reading("decode_tokens_per_second", "tokens/s", "higher", lambda s: new_tokens / s),)
    work = partial(
        _decode, loaded.module, name, cache, prompt[:, -1:], range(prompt_tokens, prompt_tokens + new_tokens)
    )
    protocol += f", {new_tokens} new tokens"
    if cache.is_croppable:
        cache.activate_past_recording()  # or a sliding window could not be cut back after decoding
    else:
        protocol += " after a copy of the prompt's recurrent states"
    yield Clock(task, work, decode, protocol, rounds=rounds)


def _prefill(module: PreTrainedModel, prompt: Tensor) -> None:
    with torch.inference_mode():
        module(input_ids=prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def _decode(module: PreTrainedModel, name: str, cache: Cache, token: Tensor, positions: Sequence[int]) -> None:
    """Write a token at each position. Some hybrid models (Bamba) need to be told the position."""
    network = module.get_base_model() if hasattr(module, "get_base_model") else module
    takes_positions = "position_ids" in inspect.signature(network.forward).parameters
    used = cache if cache.is_croppable else copy.deepcopy(cache)  # recurrent states cannot be cut back
    places = torch.tensor(positions, device=token.device).view(-1, 1, 1) if takes_positions else None
    with torch.inference_mode():
        for i in range(len(positions)):
            told = {} if places is None else {"position_ids": places[i]}  # (1, 1)
            token = module(input_ids=token, **{name: used}, use_cache=True, **told).logits[:, -1:].argmax(-1)
    if used is cache:
        cache.crop(-len(positions))
