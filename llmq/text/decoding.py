"""Greedy decoding of many texts at once: the next text takes the slot of one that ends, and none is padded.

No text depends on the others: every token attends to the keys of its own text, in their order (`prefix_attention`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq import together
from llmq.environment import free_memory
from llmq.terminal import Bar
from llmq.text import prefix_attention, prefix_tree
from llmq.text.attention import crosses
from llmq.text.scoring import LEAST, TOKENS, of_the_batch

if TYPE_CHECKING:
    from llmq.types import Loaded

SLOTS = 32
"""Texts that are written at once, if their keys and values fit into `MEMORY`."""
GROUP = 4 * SLOTS
"""Texts that are written to their end before the next ones begin, so that any number of processes writes them beside
the same others: a library may let the last bits of a product depend on its other rows."""
FEWEST = 8
"""Tokens in a step at least: a product may sum a single row in another order than one of several rows."""
MEMORY = 2**30
"""Bytes of keys and values on a processor, at two bytes a number."""
SHARE = 0.5
"""The share of the free memory of a card that keys and values may take."""


@dataclass(frozen=True)
class Job:
    """A prompt, its stop sequences, and the largest number of tokens to write."""

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    most: int
    settings: Mapping[str, object] = field(default_factory=dict)
    """Further settings of `generate`; a sampled text is written alone."""

    @property
    def greedy(self) -> bool:
        """A job is greedy if it asks for no sampling, no beams, and no other change of the probabilities."""
        plain = not self.settings.get("do_sample") and self.settings.get("num_beams", 1) == 1
        return plain and self.settings.keys() <= {"do_sample", "num_beams", "temperature", "top_p", "top_k"}


def generate(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    device: str,
    slots: int | None = None,
) -> list[str]:
    """The model's text for each job, up to the first stop sequence; at most `slots` texts at once."""
    opened = together.opened_as(module)
    if opened:  # the others have a tokenizer of their own
        made = together.answers_of(partial(_written_by, jobs, slots), [opened])
    else:
        found = _written(module, tokenizer, jobs, device, slots, together.Share())
        made = [found[i] for i in range(len(jobs))]
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in made)
    return [cut(text, job.stops) for text, job in zip(texts, jobs, strict=True)]


def _written_by(
    jobs: Sequence[Job], slots: int | None, models: Sequence["Loaded"], share: together.Share
) -> dict[int, list[int]]:
    (one,) = models
    return _written(one.module, one.processor, jobs, one.device, slots, share)


def _written(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    device: str,
    slots: int | None,
    share: together.Share,
) -> dict[int, list[int]]:
    """The new tokens of a share of the jobs: every N-th of those written alone, and every N-th group of the others."""
    lengths = [n for job in jobs for n in (len(job.ids), len(job.ids) + job.most)]
    stock = bool(prefix_attention.why_not(module, device)) or steered(module) or crosses(module, *lengths)
    asked: Counter[str] = Counter()  # the same job again gets another seed, or all samples would be equal
    alone: list[tuple[int, int]] = []  # job, seed
    for i, job in enumerate(jobs):
        if stock or not job.greedy:
            alone.append((i, asked[str(job)]))
            asked[str(job)] += 1
    others = sorted({*range(len(jobs))} - {i for i, _ in alone}, key=lambda i: (-len(jobs[i].ids), i))
    own = list(share.of(alone))
    groups = [others[begin : begin + GROUP] for begin in share.of(range(0, len(others), GROUP))]
    bar = Bar("writing", len(own) + sum(map(len, groups)))
    made: dict[int, list[int]] = {}
    with torch.inference_mode():
        for i, seed in own:
            made[i] = _by_itself(module, tokenizer, jobs[i], device, seed)
            bar.advance()
    for group in groups:
        made |= side_by_side(module, tokenizer, {i: jobs[i] for i in group}, device, slots, bar)
    bar.close()
    return made


def side_by_side(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Mapping[int, Job],
    device: str,
    slots: int | None,
    bar: Bar,
) -> dict[int, list[int]]:
    """The likeliest tokens that follow each prompt, up to an end mark or a stop sequence, many texts at once.

    The model must allow it (`prefix_attention.why_not`).
    """
    made: dict[int, list[int]] = {i: [] for i in jobs}
    with torch.inference_mode():
        for i, token, done in _Writer(module, tokenizer, jobs, device, slots).tokens() if jobs else ():
            made[i].append(token)
            if done:
                bar.advance()
    return made


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of its stop sequences."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def end_marks(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text, by the model's generation settings and by the tokenizer."""
    configured = module.generation_config.eos_token_id
    marks = configured if isinstance(configured, list) else [configured]
    return {int(m) for m in (*marks, tokenizer.eos_token_id) if m is not None}


STEERING: dict[str, object] = {"num_beams": 1, "min_length": 0, "min_new_tokens": None}
STEERING |= dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1.0)
STEERING |= dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0)
STEERING |= dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"))
STEERING |= dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"))
STEERING |= dict.fromkeys(("guidance_scale", "stop_strings", "watermarking_config", "max_time"))
STEERING |= dict.fromkeys(("penalty_alpha", "dola_layers", "token_healing"))
"""Generation settings that change which token is written next, and the values at which they change nothing."""


def steered(module: PreTrainedModel) -> bool:
    """True if the model's own generation settings change which token is the likeliest."""
    values = {name: getattr(module.generation_config, name, None) for name in STEERING}
    return any(value not in (None, STEERING[name]) for name, value in values.items())


def _by_itself(
    module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job, device: str, seed: int
) -> list[int]:
    """The new tokens that the model's own `generate` makes of a job."""
    torch.manual_seed(seed)
    settings = {"do_sample": False, **job.settings}
    if not settings["do_sample"]:
        settings.pop("temperature", None)
    ids = torch.tensor([job.ids]).to(device)  # (1, tokens)
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
    """Prompt and written tokens but the last, which the model has not read yet."""
    written: list[int]


class _Writer:
    """The texts in their slots, with the keys and values of every layer: (slots, groups, tokens, d) each."""

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        jobs: Mapping[int, Job],
        device: str,
        slots: int | None,
    ):
        self.module, self.tokenizer, self.jobs, self.device = module, tokenizer, jobs, device
        self.ends = end_marks(module, tokenizer)
        self.waiting = sorted(jobs, key=lambda i: -len(jobs[i].ids))
        self.room = max(len(job.ids) + job.most for job in jobs.values())  # tokens of the longest text
        self.slots: list[_Text | None] = [None] * self._count(slots)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values

    def _count(self, wanted: int | None) -> int:
        """The number of slots: as many as wanted, or as many as fit into `MEMORY`, or a share of a card."""
        config = prefix_attention.unwrapped(self.module).config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        bytes_each = 4 * self.room * groups * width * config.num_hidden_layers  # keys and values, two bytes a number
        memory = MEMORY if self.device == "cpu" else SHARE * free_memory(self.device)
        # At most `SLOTS`: packed layers compute many rows by another kernel than few.
        count = min(wanted or max(1, int(memory // bytes_each)), SLOTS)
        return min(1 if of_the_batch(self.module) else count, len(self.waiting))

    def tokens(self) -> Iterator[tuple[int, int, bool]]:
        """Each token once it is written: (job, token, True if the token ends the job)."""
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
        """Read the next prompts into the free slots, and write the first token of each. Returns the filled slots."""
        free = [slot for slot, text in enumerate(self.slots) if text is None]
        taken, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        for row in prefix_tree.rows([self.jobs[i].ids for i in taken], TOKENS):
            slots = [free[m] for m in row.members]

            def store(
                layer: int, key: Tensor, value: Tensor, row: prefix_tree.Row = row, slots: Sequence[int] = slots
            ) -> None:
                for slot, places in zip(slots, row.places, strict=True):
                    for kept, new in zip(self._kept(layer, key, value), (key, value), strict=True):
                        kept[slot, :, : len(places)] = new[:, list(places)]  # (groups, tokens of the prompt, d)

            ends = [places[-1] for places in row.places]
            logits = prefix_attention.forward(self.module, row, ends, self.device, LEAST, store)
            for member, token in zip(row.members, logits.argmax(-1).tolist(), strict=True):
                job = taken[member]
                self.slots[free[member]] = _Text(job, list(self.jobs[job].ids), [token])
        return free[: len(taken)]

    def _kept(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.kept:
            made = [x.new_zeros(len(self.slots), x.shape[0], self.room, x.shape[-1]) for x in (key, value)]
            self.kept[layer] = made[0], made[1]
        return self.kept[layer]

    def _step(self) -> list[int]:
        """Write one more token of every text; a free slot reads a token that no text sees. Returns the slots in use."""
        active = [slot for slot, text in enumerate(self.slots) if text]
        filling = [0] * max(0, FEWEST - len(self.slots))
        ids = [text.written[-1] if text else 0 for text in self.slots] + filling
        lengths = [len(text.ids) if text else 0 for text in self.slots]
        rows, ends = torch.arange(len(lengths)).to(self.device), torch.tensor(lengths).to(self.device)
        seen = max(lengths) + 1  # tokens of the longest text, the new one with them
        hidden = torch.arange(seen).to(self.device) > ends[:, None]  # (slots, tokens)

        def attention(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            # query (heads, slots, d); key, value (groups, slots, d): the row's tokens are one of each text.
            keys, values = self._kept(layer.layer_idx, key, value)  # type: ignore[arg-type]
            query, key, value = (x[:, : len(lengths)] for x in (query, key, value))
            keys[rows, :, ends], values[rows, :, ends] = key.transpose(0, 1), value.transpose(0, 1)
            groups, (heads, slots, d) = key.shape[0], query.shape
            # The heads of a group share their keys: one product for all of them.
            q = (query * scaling).transpose(0, 1).reshape(slots, groups, heads // groups, d)
            # (slots, groups, heads of a group, tokens)
            scores = (q @ keys[:, :, :seen].transpose(-1, -2)).masked_fill(hidden[:, None, None], float("-inf"))
            weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
            mixed = (weights @ values[:, :, :seen]).reshape(slots, heads, -1)  # (slots, heads, d)
            return torch.cat([mixed, mixed.new_zeros(len(filling), *mixed.shape[1:])])

        positions = lengths + filling
        logits = prefix_attention.run(self.module, ids, positions, range(len(lengths)), self.device, attention)
        for slot, token in enumerate(logits.argmax(-1).tolist()):
            text = self.slots[slot]
            if text:
                text.ids.append(text.written[-1])
                text.written.append(token)
        return active
