"""Prompts as tokens: through the chat template of the model, or as plain text to be continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.guarded.templates import dated_today
from llmq.text.conversation import rendered
from llmq.text.messages import Message
from llmq.text.tokenizer import beginning
from llmq.types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Prompting:
    """The way to put a question to a model; `raw` leaves the chat template out, and `system` is a first turn."""

    tokenizer: PreTrainedTokenizerBase
    raw: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.system and not self.templated:
            why = "--raw leaves it out" if self.tokenizer.chat_template else "this model has none"
            raise UserError(f"--system {self.system[:40]!r} needs a chat template, and {why}")

    @property
    def templated(self) -> bool:
        """True if questions go through a chat template."""
        return bool(self.tokenizer.chat_template) and not self.raw

    def question(self, text: str) -> Ids:
        """The tokens of a prompt: a user's turn, or under no template the text itself."""
        return self.conversation([{"role": "user", "content": text}]) if self.templated else self.plain(text)

    def conversation(self, messages: Sequence[Message], more: JsonObject | None = None) -> Ids:
        """The tokens of messages, up to where the answer begins. Raises `UserError` where the template fails."""
        if not self.templated:
            raise UserError("messages need a chat template, and none is used; write a 'prompt', or a 'text'")
        if self.system and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        with dated_today():
            text = rendered(self.tokenizer, messages, add_generation_prompt=True, **(more or {}))
        for message in messages:
            if message["role"] == "system" and message["content"].strip() not in text:
                raise UserError("the chat template of this model leaves the system turn out; ask without one")
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        for tool in (*(more or {}).get("tools", ()), *calls):
            if (name := tool["function"]["name"]) not in text:
                raise UserError(f"the chat template of this model leaves the tool {name!r} out; ask without tools")
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # the template writes the marks

    def plain(self, text: str) -> Ids:
        """The tokens of a text to be continued, after the mark with which the tokenizer begins every text, once."""
        ids, mark = self.tokenizer(text, add_special_tokens=False)["input_ids"], beginning(self.tokenizer)
        return tuple(ids if ids[: len(mark)] == mark else [*mark, *ids])
