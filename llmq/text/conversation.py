"""A conversation as the chat template writes it, and the places of the assistant's turns in the text.

A template with `{% generation %}` tags marks the turns. Under any other template a turn is found by rendering: between
the prompt for the turn and the conversation up to that turn; or, if the template writes earlier turns otherwise than
the last, in the place of a word that is rendered instead of the turn. Either way the parts before, within and after a
turn, put together, are the text itself; any other turn is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from llmq.errors import UserError
from llmq.guarded.templates import TooCostly, bound_chat_templates
from llmq.text.messages import REASONING, Message, learned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmq.text.rows import Row

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
RESERVED = {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
T = TypeVar("T")
Span = tuple[int, int]  # first character, end
Messages = Sequence[Message]


class TemplateTooCostly(UserError):
    """A chat template takes more time or memory than any text needs."""


@dataclass(frozen=True)
class Conversation:
    """A row of messages under a tokenizer's chat template, up to the last turn that is to be learned."""

    row: Row
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def messages(self) -> Messages:
        messages: Messages = self.row["messages"]
        return messages[: 1 + max(i for i, message in enumerate(messages) if learned(message))]

    @cached_property
    def template(self) -> str:
        """The text of the chat template that writes this row."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str):  # one of several, by name
            template = self.tokenizer.get_chat_template(None, self.row.get("tools"))
        return str(template)

    @cached_property
    def text(self) -> str:
        """The whole text. Raises `UserError` if the template drops something that changes the meaning."""
        self._check_settings()
        text = self.render(self.messages)
        self._check_nothing_dropped(text)
        return text

    def turns(self, is_learned: bool) -> Iterator[Span]:
        """The places of the assistant's turns in the text, of those that are to be learned or of the others.

        A turn ends after its end mark, or before the mark if only a placeholder word could show the place.
        """
        for i, message in enumerate(self.messages):
            if message["role"] == "assistant" and learned(message) == is_learned:
                yield self._turn(i)

    def tagged(self) -> list[Span]:
        """The places that the template's own `{% generation %}` tags enclose; none without tags."""
        if not GENERATION.search(self.template):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        def render(messages: Messages, **settings: object) -> list[Span]:
            special = self.tokenizer.special_tokens_map
            rendered, spans = render_jinja_template(
                [messages], chat_template=self.template, return_assistant_tokens_mask=True, **{**special, **settings}
            )
            # Places in a text that was rendered otherwise would be other characters.
            return [(start, end) for start, end in spans[0] if start < end] if rendered == [self.text] else []

        return self._guarded(render, self.messages)

    def render(self, messages: Messages, prompt: bool = False) -> str:
        """The text of messages; with `prompt`, up to where the assistant's answer begins."""

        def render(given: Messages, **settings: object) -> str:
            apply = self.tokenizer.apply_chat_template
            return str(apply(given, tokenize=False, add_generation_prompt=prompt, **settings))

        return self._guarded(render, messages)

    @property
    def begins(self) -> str:
        """The first words of the conversation, for an error."""
        return next((str(m["content"])[:40] for m in self.row["messages"] if m["content"]), "")

    def _guarded(self, render: Callable[..., T], messages: Messages) -> T:
        bound_chat_templates()
        # `weight` says whether a turn is learned, and is no part of the conversation.
        plain = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        tools = {"tools": self.row["tools"]} if "tools" in self.row else {}
        settings = {**tools, **self.row.get("chat_template_kwargs", {})}
        with template_refuses(f"the row that begins {self.begins!r}"):
            try:
                return render(plain, **settings)
            except TypeError:  # some templates insert the arguments of a call unchanged, and need text
                return render([_with_text_arguments(message) for message in plain], **settings)

    def _tried(self, messages: Messages, prompt: bool = False) -> str | None:
        """The text of messages, or None for no messages or messages that the template refuses."""
        try:
            return self.render(messages, prompt) if messages else None
        except TemplateTooCostly:  # every further try would take as long
            raise
        except UserError:
            return None

    def _turn(self, i: int) -> Span:
        before, prompt = self._tried(self.messages[:i]), self._tried(self.messages[:i], prompt=True)
        upto = self.text if i == len(self.messages) - 1 else self._tried(self.messages[: i + 1])
        # A place counts only if the text up to the place is the text of the whole conversation so far.
        start = len(prompt) if prompt is not None and self.text.startswith(prompt) else None
        end = len(upto) if upto is not None and self.text.startswith(upto) else None
        # A template without a prompt for an answer may still write something before the answer, such as a role.
        if start is None or end is None or before == prompt:
            place = self._place(i) or (start, end)
            has_prompt = start is not None and (before != prompt or not self.text[start : place[0]].strip())
            start, end = start if has_prompt else place[0], place[1] if end is None or before == prompt else end
        if start is None or end is None or start >= end:
            raise UserError(
                f"the chat template of this tokenizer writes turn {i} of the row that begins {self.begins!r} so that "
                "it cannot be told apart from the others; use one turn a row, or a template with {% generation %} tags"
            )
        return start, end

    def _place(self, i: int) -> Span | None:
        """The place of a word that is rendered instead of a turn, or None if the text around the word changes."""
        word = "PLACEHOLDER"
        while word in self.text:  # the word must be found once
            word += "R"
        rendered = self._tried([*self.messages[:i], {"role": "assistant", "content": word}, *self.messages[i + 1 :]])
        if rendered is None or rendered.count(word) != 1:
            return None
        before, after = rendered.split(word)
        is_exact = self.text.startswith(before) and self.text.endswith(after)
        # A blank before a word is part of the word's first token.
        return (len(before.rstrip(" ")), len(self.text) - len(after)) if is_exact else None

    def _check_settings(self) -> None:
        for name in self.row.get("chat_template_kwargs", {}):
            if name in RESERVED or name not in self.template:
                raise UserError(f"chat_template_kwargs: the chat template of this tokenizer takes no {name!r}")

    def _check_nothing_dropped(self, text: str) -> None:
        def refuse(lost: str, cure: str) -> None:
            raise UserError(
                f"the chat template of this tokenizer leaves out {lost} of the row that begins {self.begins!r}; {cure}"
            )

        for tool in self.row.get("tools", []):
            if tool["function"]["name"] not in text:
                refuse(f"'tools' ({tool['function']['name']!r})", "use a template that knows tools, or drop the column")
        told = "\n".join(str(message["content"]) for message in self.messages)
        for i, message in enumerate(self.messages):
            for call in message.get("tool_calls", []):
                if call["function"]["name"] not in text:
                    refuse(f"'tool_calls' of message {i}", "use a template that knows tools")
            if self._is_dropped(i, text, told):
                refuse(f"message {i} (role {message['role']!r})", "use a template that knows this role, or drop it")
            reasoning = message.get("reasoning_content", "").strip()
            is_last = i == len(self.messages) - 1  # a template may drop the reasoning of earlier turns, as at inference
            if reasoning and (not any(n in self.template for n in REASONING) or (is_last and reasoning not in text)):
                refuse(f"'reasoning_content' of message {i}", "write it into the content, as the model does")

    def _is_dropped(self, i: int, text: str, told: str) -> bool:
        """True if the content of a message does not change the text; `told` is the content of all messages."""
        content = self.messages[i]["content"].strip()
        for written in (content, json.dumps(content, ensure_ascii=False)[1:-1]):  # or as JSON
            # Another message may hold the same words.
            if not content or text.count(written) >= max(1, told.count(content)):
                return False
        other = {**self.messages[i], "content": "PLACEHOLDER"}  # a template may rewrite a content
        return self._tried([*self.messages[:i], other, *self.messages[i + 1 :]]) == text


@contextmanager
def template_refuses(row: str) -> Iterator[None]:
    """Turn any error of a chat template's code into one line that names the row."""
    from jinja2 import TemplateError

    try:
        yield
    except TooCostly as error:
        raise TemplateTooCostly(f"the chat template of this tokenizer cannot write {row}: {error}") from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"the chat template of this tokenizer refuses {row}: {why}") from None


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, **settings: object) -> str:
    """Messages as the chat template of a tokenizer writes them."""
    bound_chat_templates()
    with template_refuses(f"the conversation that begins {str(messages[0]['content'])[:40]!r}"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
