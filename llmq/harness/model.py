"""The language model that lm-eval asks: tokens as in lm-eval's own class, and faster answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmq.errors import UserError
from llmq.text import decoding, scoring
from llmq.text.conversation import rendered
from llmq.text.tokenizer import marks_around, positions

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[object, list[int], list[int]]
"""A question of lm-eval's, which stays unread, and the tokens of context and continuation."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """An opened causal model. Shared prefixes are computed once, and no score depends on the batch size."""

    def __init__(
        self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str, batch_size: int | None = None
    ):
        super().__init__()
        self.module, self.tokenizer, self._device, self.batch_size = module, tokenizer, device, batch_size
        self.cut: dict[str, set[int | None]] = {}
        """The questions whose beginning was cut off, by task."""

    @cached_property
    def max_length(self) -> int:
        """The longest text of the model in tokens: by lm-eval's rule, which misses MPT's limit, and by `positions`."""
        said = int(resolve_max_length(self.module.config, self.tokenizer))
        return min(said, positions(self.module) or said)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def _begin(self) -> int | None:
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((int(mark) for mark in marks if mark is not None), None)

    @property
    def prefix_token_id(self) -> int:
        if self._begin is None:
            raise UserError("a text without context begins with BOS or EOS, and this tokenizer has neither")
        return self._begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    @cached_property
    def _after(self) -> int:
        """The number of marks that the tokenizer puts after every text: nothing goes on from a text that has ended."""
        return len(marks_around(self.tokenizer)[1])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        if add_special_tokens is None and self._begin is not None:  # no second beginning-of-text token
            add_special_tokens = False if string.startswith(self.tokenizer.decode(self._begin)) else None
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = list(self.tokenizer.encode(string, **special))
        return ids if add_special_tokens is False else ids[: len(ids) - self._after]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        goes_on = not add_generation_prompt
        return rendered(self.tokenizer, chat_history, add_generation_prompt=not goes_on, continue_final_message=goes_on)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[scoring.Score]:
        """The log-likelihood of each continuation after its context; a text that is too long loses its beginning.

        Raises `UserError`, naming task and question, for an empty or too long continuation, or an empty context.
        """
        pairs: list[Pair] = []
        for request in requests:
            context, continuation = self._tokens(request)
            if len(context) + len(continuation) > self.max_length + 1:
                self._lose_beginning(request)
            pairs.append((request.args, context, continuation))
        return self._loglikelihood_tokens(pairs)

    def _tokens(self, request: Instance) -> tuple[list[int], list[int]]:
        text, said = request.args
        if text:
            context, continuation = self._encode_pair(text, said)
        else:  # a continuation that begins with the prefix token needs no second one
            ids = self.tok_encode(said, add_special_tokens=False)
            have = int(ids[:1] == [self.prefix_token_id])
            context, continuation = [self.prefix_token_id], ids[have:]
        if not continuation:
            raise UserError(f"{_question(request)}: the continuation {said!r} has no tokens, so none can be scored")
        if not context:
            raise UserError(
                f"{_question(request)}: the context {text!r} is blank, so the continuation has nothing before it"
            )
        if len(continuation) > self.max_length:
            raise UserError(
                f"{_question(request)}: the continuation has {len(continuation)} tokens, and the model takes "
                f"{self.max_length}; it begins with {said[:40]!r}"
            )
        return context, continuation

    def _lose_beginning(self, request: Instance) -> None:
        self.cut.setdefault(str(getattr(request, "task_name", None)), set()).add(getattr(request, "doc_id", None))

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: object) -> list[scoring.Score]:
        asked = [
            scoring.Request(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))
            for _, context, continuation in requests
        ]
        return scoring.score(self.module, asked, self._device, self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts; one longer than the model takes is cut, and each token scored once."""
        windows: list[Pair] = []
        owners = []
        for i, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, list(context), list(continuation)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += total
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The model's text after each context, up to the first stop sequence of the request."""
        end = None if self.tokenizer.eos_token_id is None else self.tokenizer.decode(self.eot_token_id)
        jobs = []
        for request in requests:
            context, settings = request.args
            wanted = normalize_gen_kwargs(settings, 256)
            stops = handle_stop_sequences(wanted.pop("until", None), eos=end)
            most = wanted.pop("max_gen_toks")
            if most >= self.max_length:
                raise UserError(
                    f"{_question(request)}: a task asks for {most} tokens, and the model takes {self.max_length}, its "
                    "prompt included; set max_gen_toks lower in the task's file"
                )
            ids, room = self.tok_encode(context), self.max_length - most
            if not ids:
                raise UserError(f"{_question(request)}: the prompt {context!r} has no tokens to go on from")
            if len(ids) > room:
                self._lose_beginning(request)
            jobs.append(decoding.Job(tuple(ids[-room:]), tuple(stops), most, wanted))
        return decoding.generate(self.module, self.tokenizer, jobs, self._device, self.batch_size)


def _question(request: Instance) -> str:
    """The task and the number of a request; numbers count from 0, as lm-eval's `doc_id` does."""
    return f"task {getattr(request, 'task_name', None)!r}, question {getattr(request, 'doc_id', None)}"
