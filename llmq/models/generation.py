"""How fast a language model writes: a prefill and a decode as units of work."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from llmq.types import Clock, Loaded, Reading


def clocks(loaded: Loaded, task: str, prompt_tokens: int, new_tokens: int, rounds: int) -> Iterable[Clock]:
    """One forward pass over a prompt with the choice of its first token; greedy decoding from that prompt's cache.

    One sequence at a time. The cache is cut back after each decode.
    """
    import torch

    vocabulary = loaded.module.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(loaded.device)
    with torch.inference_mode():
        cache = loaded.module(input_ids=prompt, use_cache=True).past_key_values
    cache.activate_past_recording()  # or a sliding window could not be cut back after decoding
    protocol = f"batch 1, {prompt_tokens}-token prompt, {torch.get_num_threads()} threads, {loaded.device}"
    first = (
        Reading("time_to_first_token", "ms", "lower", lambda s: 1000 * s),
        Reading("prefill_tokens_per_second", "tokens/s", "higher", lambda s: prompt_tokens / s),
    )
    decode = (Reading("decode_tokens_per_second", "tokens/s", "higher", lambda s: new_tokens / s),)
    return (
        Clock(task, partial(_prefill, loaded.module, prompt), first, protocol, rounds=rounds),
        Clock(
            task,
            partial(_decode, loaded.module, cache, prompt[:, -1:], new_tokens),
            decode,
            f"{protocol}, {new_tokens} new tokens",
            rounds=rounds,
        ),
    )


def _prefill(module: Any, prompt: Any) -> None:
    import torch

    with torch.inference_mode():
        module(input_ids=prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def _decode(module: Any, cache: Any, token: Any, count: int) -> None:
    import torch

    with torch.inference_mode():
        for _ in range(count):
            token = module(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    cache.crop(-count)
