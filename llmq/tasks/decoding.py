"""Greedy generation of many texts at once: a text that ends makes room for the next, and none is padded.

What a text becomes does not depend on the others: every token attends to the keys of its own text, in their order
(`prefix_attention`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmq.tasks import prefix_attention, prefix_tree
from llmq.tasks.scoring import LEAST, TOKENS, of_the_batch

SLOTS = 32
"""Texts that grow at once, where their keys and values fit into `MEMORY`."""
FEWEST = 8
"""Tokens in a step at least: a single row of a product may be summed in another order than one of several."""
MEMORY = 2**30
"""Bytes, at two bytes a number."""


@dataclass(frozen=True)
class Job:
    """A text to go on from, and where to stop."""

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    most: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of `generate`; a text that is sampled is made alone."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, and nothing is said of how likely it should be held."""
        plain = not self.settings.get("do_sample") and self.settings.get("num_beams", 1) == 1
        return plain and self.settings.keys() <= {"do_sample", "num_beams", "temperature", "top_p", "top_k"}


def generate(module: Any, tokenizer: Any, jobs: Sequence[Job], device: str, slots: int | None = None) -> list[str]:
    """What the model writes for each job, up to its first stop sequence; at most `slots` texts at once."""
    import torch

    from llmq.terminal import Bar

    made: list[list[int]] = [[] for _ in jobs]
    stock = bool(prefix_attention.why_not(module, device)) or steered(module)
    alone = [i for i, job in enumerate(jobs) if stock or not job.greedy]
    together = [i for i, job in enumerate(jobs) if not stock and job.greedy]
    bar = Bar("writing", len(jobs))
    with torch.inference_mode():
        asked: Counter[str] = Counter()
        for i in alone:
            made[i] = _by_itself(module, tokenizer, jobs[i], device, asked[str(jobs[i])])
            asked[str(jobs[i])] += 1
            bar.advance()
        if together:
            writer = _Writer(module, tokenizer, jobs, together, device)
            writer.open_slots(slots)
            for i, token, done in writer.tokens():
                made[i].append(token)
                if done:
                    bar.advance()
    bar.close()
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in made)
    return [cut(text, job.stops) for text, job in zip(texts, jobs, strict=True)]


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of its stop sequences."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def end_marks(module: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    configured = module.generation_config.eos_token_id
    marks = configured if isinstance(configured, list) else [configured]
    return {int(m) for m in (*marks, tokenizer.eos_token_id) if m is not None}


STEERING = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None}
STEERING |= dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"))
"""What a model's own configuration may say of tokens to be written, and what it says where it says nothing."""


def steered(module: Any) -> bool:
    """Whether the model's own generation settings change which token is the likeliest."""
    said = {name: getattr(module.generation_config, name, None) for name in STEERING}
    return any(value not in (None, STEERING[name]) for name, value in said.items())


def _by_itself(module: Any, tokenizer: Any, job: Job, device: str, seed: int) -> list[int]:
    """By the model's own `generate`; a seed for each time that the same is asked."""
    import torch

    torch.manual_seed(seed)
    settings = {"do_sample": False, **job.settings}
    if not settings["do_sample"]:
        settings.pop("temperature", None)
    ids = torch.tensor([job.ids]).to(device)
    made = module.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job.most,
        stop_strings=[s for s in job.stops if s] or None,
        tokenizer=tokenizer,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return list(made[0, len(job.ids) :].tolist())


@dataclass
class _Text:
    job: int
    ids: list[int]
    """All of its tokens but the last, which is still to be read."""
    written: list[int]


class _Writer:
    """The texts in their slots, with the keys and values of every layer: (slots, groups, tokens, d) each."""

    def __init__(self, module: Any, tokenizer: Any, jobs: Sequence[Job], order: Sequence[int], device: str):
        self.module, self.tokenizer, self.jobs, self.device = module, tokenizer, jobs, device
        self.ends = end_marks(module, tokenizer)
        self.waiting = sorted(order, key=lambda i: -len(jobs[i].ids))
        self.room = max(len(jobs[i].ids) + jobs[i].most for i in order)
        self.slots: list[_Text | None] = []
        self.kept: dict[int, tuple[Any, Any]] = {}

    def open_slots(self, wanted: int | None) -> None:
        """As many slots as asked for, or as fit into a gibibyte of keys and values."""
        config = prefix_attention.unwrapped(self.module).config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        bytes_each = 4 * self.room * groups * width * config.num_hidden_layers
        # No more than `SLOTS`: packed layers compute many rows otherwise than few.
        count = min(wanted or max(1, MEMORY // bytes_each), SLOTS)
        self.slots = [None] * min(1 if of_the_batch(self.module) else count, len(self.waiting))

    def tokens(self) -> Iterator[tuple[int, int, bool]]:
        """(job, token, whether the job is done with it) as they are written."""
        while self.waiting or any(self.slots):
            for slot in self._fill() if self.waiting and None in self.slots else self._step():
                text = self.slots[slot]
                if text is not None:
                    done = self._is_done(text)
                    yield text.job, text.written[-1], done
                    self.slots[slot] = None if done else text

    def _is_done(self, text: _Text) -> bool:
        job = self.jobs[text.job]
        if text.written[-1] in self.ends or len(text.written) >= job.most:
            return True
        # A stop sequence has no more tokens than bytes.
        tail = self.tokenizer.decode(text.written[-2 - max((len(s.encode()) for s in job.stops), default=0) :])
        return any(stop in tail for stop in job.stops if stop)

    def _fill(self) -> list[int]:
        """Read the next texts into the free slots."""
        free = [slot for slot, text in enumerate(self.slots) if text is None]
        taken, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        for row in prefix_tree.rows([self.jobs[i].ids for i in taken], TOKENS):
            slots = [free[m] for m in row.members]

            def store(layer: int, key: Any, value: Any, row: Any = row, slots: Any = slots) -> None:
                for slot, places in zip(slots, row.places, strict=True):
                    for kept, new in zip(self._kept(layer, key, value), (key, value), strict=True):
                        kept[slot, :, : len(places)] = new[:, list(places)]

            ends = [places[-1] for places in row.places]
            logits = prefix_attention.forward(self.module, row, ends, self.device, LEAST, store)
            for member, token in zip(row.members, logits.argmax(-1).tolist(), strict=True):
                job = taken[member]
                self.slots[free[member]] = _Text(job, list(self.jobs[job].ids), [token])
        return free[: len(taken)]

    def _kept(self, layer: int, key: Any, value: Any) -> tuple[Any, Any]:
        if layer not in self.kept:
            made = [x.new_zeros(len(self.slots), x.shape[0], self.room, x.shape[-1]) for x in (key, value)]
            self.kept[layer] = made[0], made[1]
        return self.kept[layer]

    def _step(self) -> list[int]:
        """One more token for every text; a free slot reads a token that nobody sees."""
        import torch

        active = [slot for slot, text in enumerate(self.slots) if text]
        filling = [0] * max(0, FEWEST - len(self.slots))
        ids = [text.written[-1] if text else 0 for text in self.slots] + filling
        lengths = [len(text.ids) if text else 0 for text in self.slots]
        rows, ends = torch.arange(len(lengths)).to(self.device), torch.tensor(lengths).to(self.device)
        seen = max(lengths) + 1
        hidden = torch.arange(seen).to(self.device) > ends[:, None]

        def attention(layer: Any, query: Any, key: Any, value: Any, scaling: float) -> Any:
            keys, values = self._kept(layer.layer_idx, key, value)
            query, key, value = (x[:, : len(lengths)] for x in (query, key, value))
            keys[rows, :, ends], values[rows, :, ends] = key.transpose(0, 1), value.transpose(0, 1)
            groups, (heads, slots, d) = key.shape[0], query.shape
            q = (query * scaling).transpose(0, 1).reshape(slots, groups, heads // groups, d)
            scores = (q @ keys[:, :, :seen].transpose(-1, -2)).masked_fill(hidden[:, None, None], float("-inf"))
            weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
            mixed = (weights @ values[:, :, :seen]).reshape(slots, heads, -1)
            return torch.cat([mixed, mixed.new_zeros(len(filling), *mixed.shape[1:])])

        positions = lengths + filling
        logits = prefix_attention.run(self.module, ids, positions, range(len(lengths)), self.device, attention)
        for slot, token in enumerate(logits.argmax(-1).tolist()):
            text = self.slots[slot]
            if text:
                text.ids.append(text.written[-1])
                text.written.append(token)
        return active
