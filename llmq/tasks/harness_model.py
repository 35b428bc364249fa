"""The language model that lm-eval asks: questions become the tokens of lm-eval's own class, answered faster."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmq.data.conversation import rendered
from llmq.errors import UserError
from llmq.models.fits import positions
from llmq.tasks import decoding, scoring


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """An opened causal model. What contexts share is computed once, and no score depends on the batch size."""

    def __init__(self, module: Any, tokenizer: Any, device: str, batch_size: int | None = None):
        super().__init__()
        self.module, self.tokenizer, self._device, self.batch_size = module, tokenizer, device, batch_size
        self.cut: dict[str, set[int | None]] = {}
        """For each task the questions that lost their beginning."""

    @cached_property
    def max_length(self) -> int:
        """The longest text that the model takes, in tokens: by lm-eval's rule, which knows no limit of MPT's."""
        said = int(resolve_max_length(self.module.config, self.tokenizer))
        return min(said, positions(self.module) or said)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text mark."""
        return int(self.tokenizer.eos_token_id)

    @property
    def _begin(self) -> int | None:
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((int(mark) for mark in marks if mark is not None), None)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self._begin is None:
            raise UserError("a text without context begins with BOS or EOS, and this tokenizer has neither")
        return self._begin

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the beginning-of-text mark is not put twice."""
        special: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        begun = self._begin is not None and string.startswith(self.tokenizer.decode(self._begin))
        if add_special_tokens is None and begun:
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it."""
        return rendered(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[scoring.Score]:
        """The log-likelihood of each continuation after its context; a text that is too long loses its beginning.

        Raises `UserError`, naming task and question, where there is nothing to score or nothing to score it from.
        """
        pairs = []
        for request in requests:
            context, continuation = self._tokens(request)
            if len(context) + len(continuation) > self.max_length + 1:
                self._lose_beginning(request)
            pairs.append((request.args, context, continuation))
        return self._loglikelihood_tokens(pairs)

    def _tokens(self, request: Any) -> tuple[list[int], list[int]]:
        """The tokens of a context and of its continuation, as lm-eval's own classes make them."""
        text, said = request.args
        if text:
            context, continuation = self._encode_pair(text, said)
        else:  # a continuation that begins with the mark itself needs no other
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

    def _lose_beginning(self, request: Any) -> None:
        task, question = getattr(request, "task_name", None), getattr(request, "doc_id", None)
        self.cut.setdefault(str(task), set()).add(question)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[scoring.Score]:
        asked = [
            scoring.Request(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))
            for _, context, continuation in requests
        ]
        return scoring.score(self.module, asked, self._device, self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts; one longer than the model takes is cut, and each token scored once."""
        windows, owners = [], []
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

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The model's text after each context, up to the first of its stop sequences."""
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


def _question(request: Any) -> str:
    """Where in a task a request comes from; its number counts from 0, as lm-eval's `doc_id` does."""
    return f"task {getattr(request, 'task_name', None)!r}, question {getattr(request, 'doc_id', None)}"
