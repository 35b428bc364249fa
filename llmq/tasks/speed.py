"""How fast a language model answers."""

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

from pydantic import PositiveInt

from llmq.types import Clock, Loaded, Measurement, Reading, Samples, Task


class Speed(Task):
    """Time to first token, prefill and decode rate, and peak memory. All stages take turns.

    Prefill is one forward pass over the prompt and the choice of the first token; decode is greedy, one sequence at a
    time, from the key-value cache of that prompt.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    prompt_tokens: PositiveInt = 128
    new_tokens: PositiveInt = 16
    rounds: PositiveInt = 12

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """Peak memory with this stage alone open."""
        from llmq.measure import peak_memory

        with peak_memory(loaded.device) as peak:
            for clock in self.clocks(loaded):
                clock.run()
        convention = f"{peak['convention']}; this stage alone open, {self.prompt_tokens} + {self.new_tokens} tokens"
        return [
            Measurement(
                self.name,
                "peak_memory",
                peak["bytes"],
                "bytes",
                "lower",
                1,
                None,
                convention,
                Samples((float(peak["bytes"]),)),
            )
        ]

    def clocks(self, loaded: Loaded) -> Iterable[Clock]:
        """One prefill, and one decode of `new_tokens` from a cache that is cut back afterwards."""
        import torch

        vocabulary = loaded.module.config.get_text_config().vocab_size
        prompt = torch.randint(vocabulary, (1, self.prompt_tokens), generator=torch.Generator().manual_seed(0))
        prompt = prompt.to(loaded.device)
        with torch.inference_mode():
            cache = loaded.module(input_ids=prompt, use_cache=True).past_key_values
        cache.activate_past_recording()  # or a sliding window could not be cut back after decoding
        protocol = f"batch 1, {self.prompt_tokens}-token prompt, {torch.get_num_threads()} threads, {loaded.device}"
        first = (
            Reading("time_to_first_token", "ms", "lower", lambda s: 1000 * s),
            Reading("prefill_tokens_per_second", "tokens/s", "higher", lambda s: self.prompt_tokens / s),
        )
        decode = (Reading("decode_tokens_per_second", "tokens/s", "higher", lambda s: self.new_tokens / s),)
        return (
            Clock(self.name, partial(_prefill, loaded.module, prompt), first, protocol, rounds=self.rounds),
            Clock(
                self.name,
                partial(_decode, loaded.module, cache, prompt[:, -1:], self.new_tokens),
                decode,
                f"{protocol}, {self.new_tokens} new tokens",
                rounds=self.rounds,
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
