"""Answers of a language model to prompts from files and from the command line, as lines of JSON.

Texts of one seed are the same whatever stands beside them. The likeliest tokens are written many texts at once where
the model allows it, and drawn ones text by text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.files import in_json, write_text
from llmq.guarded import strict_json
from llmq.guarded.files import read_text
from llmq.predictors import Input, Inputs, Predictor
from llmq.terminal import Bar, say
from llmq.text import messages as chat
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.text.prompting import Prompting
    from llmq.text.streaming import Sampling
    from llmq.types import Loaded

FILE = "answers.jsonl"
COLUMNS = ("messages", "prompt", "text")


@dataclass(frozen=True)
class Asked:
    """One prompt: `column` is `prompt` (a question), `messages`, or `text` (to be continued)."""

    where: str
    origin: JsonObject
    column: str
    value: Any
    more: JsonObject = field(default_factory=dict)
    """What goes to the chat template besides: tools."""

    def ids(self, prompting: Prompting) -> tuple[int, ...]:
        """The tokens of the prompt. Raises `UserError` that says where it stands."""
        try:
            if self.column == "messages":
                return prompting.conversation(self.value, self.more)
            return prompting.plain(self.value) if self.column == "text" else prompting.question(self.value)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None


@dataclass(frozen=True)
class Job:
    """A prompt as tokens, and the largest number of tokens to write."""

    asked: Asked
    ids: tuple[int, ...]
    most: int


class Answering(Predictor):
    suffixes: ClassVar[frozenset[str]] = frozenset({".txt", ".jsonl"})

    prompts: tuple[str, ...] = Field((), description="prompts of the command line")
    system: str | None = Field(None, description="the system turn before each prompt that has none")
    raw: bool = Field(False, description="continue prompts as plain text, without the chat template")
    max_new_tokens: PositiveInt = Field(256, description="tokens of an answer at most")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token; another draws")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest tokens of this share")
    seed: int = Field(0, ge=0, description="of drawn answers")

    def model_post_init(self, _: object) -> None:
        if self.top_p < 1 and not self.temperature:
            raise UserError(f"--top-p {self.top_p:g} has no effect at --temperature 0, which draws nothing; set both")

    @property
    def reads_files(self) -> bool:
        return not self.prompts

    def check(self, item: Input, model: object) -> None:
        read_prompts(item)

    def write(self, loaded: Loaded, inputs: Inputs, folder: Path) -> int:
        """Write `answers.jsonl`: a row a prompt, with the answer, why it ended, and the settings."""
        from llmq.text.decoding import end_marks
        from llmq.text.prompting import Prompting

        prompting = Prompting(loaded.processor, self.raw, self.system)
        self.say_settings(loaded, prompting)
        told = [_of_command(i, text) for i, text in enumerate(self.prompts)]
        told += [asked for item in inputs.items for asked in read_prompts(item)]
        jobs = list(self._jobs(told, prompting, loaded, inputs))
        if not jobs:
            raise UserError(f"no prompt can be answered; the first: {next(iter(inputs.skipped.values()))}")
        ends = end_marks(loaded.module, loaded.processor)
        rows = []
        for job, ids in zip(jobs, self._written(jobs, loaded, ends), strict=True):
            row = {**job.asked.origin, job.asked.column: job.asked.value, **job.asked.more}
            row["answer"] = loaded.processor.decode(ids, skip_special_tokens=True)
            stop = "end" if ids[-1] in ends else "length" if len(ids) == self.max_new_tokens else "positions"
            row |= {"stop": stop, "prompt_tokens": len(job.ids), "tokens": len(ids)}
            rows.append({**row, "settings": self._told(prompting.templated and job.asked.column != "text")})
        write_text(
            folder / FILE, "".join(f"{in_json(json.dumps(row, ensure_ascii=False, allow_nan=False))}\n" for row in rows)
        )
        return len(rows)

    @property
    def sampling(self) -> Sampling:
        from llmq.text.streaming import Sampling

        return Sampling(self.temperature, self.top_p, self.seed)

    def say_settings(self, loaded: Loaded, prompting: Prompting) -> None:
        """Say what a user may not expect: no chat template, and settings of the model that are not applied."""
        from llmq.text.decoding import steered

        if not prompting.templated and not self.raw:
            say("this model has no chat template: prompts are continued as plain text")
        if hasattr(loaded.module, "generation_config") and steered(loaded.module):
            say("penalties and bans in the model's own generation settings are not applied")

    def _told(self, templated: bool) -> JsonObject:
        draws = {"top_p": self.top_p, "seed": self.seed} if self.temperature else {}
        told = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, **draws}
        return {**told, "chat_template": templated, **({"system": self.system} if self.system else {})}

    def _jobs(self, told: Sequence[Asked], prompting: Prompting, loaded: Loaded, inputs: Inputs) -> Iterator[Job]:
        """The prompts that the model can take."""
        from llmq.text.tokenizer import positions

        limit = positions(loaded.module)
        for asked in told:
            job = None
            with inputs.bad_skipped(asked.where):
                ids = asked.ids(prompting)
                if not ids:
                    raise UserError(f"{asked.where}: the prompt is empty, and the tokenizer begins texts with no mark")
                if limit and len(ids) >= limit:
                    raise UserError(f"{asked.where}: {len(ids)} tokens; the model has {limit} positions")
                job = Job(asked, ids, min(self.max_new_tokens, limit - len(ids)) if limit else self.max_new_tokens)
            if job:
                yield job

    def _written(self, jobs: Sequence[Job], loaded: Loaded, ends: set[int]) -> list[list[int]]:
        """The tokens of each answer, with the end mark if there is one."""
        from llmq.text import decoding, prefix_attention
        from llmq.text.attention import crosses
        from llmq.text.streaming import Reader, stream

        module, device, sampling = loaded.module, loaded.device, self.sampling
        bar = Bar("answering", len(jobs))
        try:
            apart = crosses(module, *(n for job in jobs for n in (len(job.ids), len(job.ids) + job.most)))
            if not self.temperature and not apart and not prefix_attention.why_not(module, device):
                asked = {i: decoding.Job(job.ids, (), job.most) for i, job in enumerate(jobs)}
                return list(decoding.side_by_side(module, loaded.processor, asked, device, None, bar).values())
            made, times = [], Counter[tuple[int, ...]]()
            for job in jobs:
                pick = sampling.picker(job.ids, times[job.ids])
                made.append(list(stream(Reader(module, device), job.ids, job.most, pick, ends)))
                times[job.ids] += 1  # the same prompt again gets another draw
                bar.advance()
            return made
        finally:
            bar.close()


def _of_command(number: int, text: str) -> Asked:
    return Asked(f"--prompt {text[:40]!r}", {"file": None, "line": number + 1}, "prompt", text)


def read_prompts(item: Input) -> list[Asked]:
    """The prompts of a file: a .txt is one, without its last line break; a .jsonl has one a row.

    Raises `UserError` with the line for the first bad row, and for other files.
    """
    suffix = item.path.suffix.lower()
    if suffix == ".txt":
        text = read_text(item.path).removesuffix("\n").removesuffix("\r")
        if not text.strip():
            raise UserError(f"{item.path}: the prompt is empty")
        return [Asked(str(item.path), {"file": item.name, "line": 1}, "prompt", text)]
    if suffix != ".jsonl":
        raise UserError(f"{str(item.path)!r}: prompts are read from .txt and .jsonl files, or given by --prompt")
    rows = enumerate(read_text(item.path).split("\n"), 1)
    asked = [_row(item, line, text.strip()) for line, text in rows if text.strip()]
    if not asked:
        raise UserError(f"{item.path}: holds no prompt")
    return asked


def _row(item: Input, line: int, text: str) -> Asked:
    where = f"{item.path}:{line}"
    try:
        row, end = strict_json.parse(text)
    except (json.JSONDecodeError, strict_json.NotPlain) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if end != len(text) or not isinstance(row, dict):
        raise UserError(f'{where}: a row is one JSON object, such as {{"prompt": "…"}}')
    if why := strict_json.why_not_plain(row):
        raise UserError(f"{where}: cannot be used: {why}")
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise UserError(f"{where}: has no column {', '.join(map(repr, COLUMNS))}; its columns: {', '.join(row)[:200]}")
    value, origin = row[column], {"file": item.name, "line": line}
    if column == "messages" or isinstance(value, list):
        return Asked(where, origin, "messages", _open(value, column, where), _tools(row, where))
    if not isinstance(value, str):
        raise chat.refused(value, "text", column, where)
    if not value.strip():
        raise UserError(f"{where}: column {column!r} is empty")
    return Asked(where, origin, column, value)


def _open(value: object, column: str, where: str) -> list[chat.Message]:
    """The messages before the answer: the assistant's last turns, which training data has, are left out."""
    messages = chat.messages_of(value, column, where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{where}: column {column!r} has no turn to answer")
    return [{key: each for key, each in message.items() if key != "weight"} for message in messages]


def _tools(row: JsonObject, where: str) -> JsonObject:
    tools = chat.tools_of(row, where)
    return {"tools": tools} if tools else {}
