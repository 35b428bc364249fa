"""Messages in the form of chat templates, from conversations in the forms that data sets have.

A message has a `role` (system, user, assistant, tool), `content`, and where they are given `tool_calls`,
`reasoning_content`, and `weight: 0` for a turn of the assistant that is not to be learned. Other keys stay as they are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmq.errors import UserError
from llmq.guarded import strict_json
from llmq.guarded.strict_json import shown

Message = dict[str, Any]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
# OpenAI says developer, ShareGPT human and gpt, Gemma model.
ROLES |= {"developer": "system", "human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant"}
ROLES |= {"model": "assistant", "function": "tool", "observation": "tool", "ipython": "tool"}
ROLES |= {"function_call": "assistant"}  # the turn holds a call in place of a text
"""The names of a turn at OpenAI, in ShareGPT and of Gemma -> the names in chat templates."""

REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = ("weight", "train", "training", "loss")
"""Keys that keep a turn of the assistant from being learned, where they are 0 or false."""
CONSUMED = {"role", "from", "content", "value", "tool_calls", "function_call", *REASONING, *WEIGHTS}


def refused(value: object, wanted: str, column: str, where: str) -> UserError:
    """The error for a column that does not hold the `wanted` kind of value."""
    return UserError(f"{where}: column {column!r} is {shown(value)}, not {wanted}")


def parsed(value: object, where: str) -> object:
    """The value itself, or the value of JSON within a text, as in a CSV file. Raises `UserError` for broken JSON."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return strict_json.parse(value.strip())[0]
    except (json.JSONDecodeError, strict_json.NotPlain) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def messages_of(value: object, column: str, where: str) -> list[Message]:
    """The messages in a column, in the form of chat templates. Raises `UserError` for a value without that form."""
    value = parsed(value, f"{where}: column {column!r}")
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: column {column!r} is not a list of messages")
    return [_plain(message) or _message(message, f"{where}: message {i}", column) for i, message in enumerate(value)]


def learned(message: Message) -> bool:
    """True for a turn of the assistant that is to be learned."""
    return message["role"] == "assistant" and message.get("weight") != 0


def check_learned(messages: Sequence[Message], column: str, where: str) -> None:
    """Raise `UserError` for a conversation without a turn to learn."""
    if not any(map(learned, messages)):
        raise UserError(f"{where}: column {column!r} has no assistant message to learn from")


def _plain(raw: object) -> Message | None:
    """The message, where it has nothing but a role and a text, as nearly all have; otherwise None."""
    if not isinstance(raw, dict) or raw.keys() != {"role", "content"}:
        return None
    role, content = raw["role"], raw["content"]
    # The text of a function_call is a call, to be parsed.
    is_usual = isinstance(role, str) and role in ROLES and role != "function_call"
    if not is_usual or not isinstance(content, str) or not content or content.isspace():
        return None
    return {"role": ROLES[role], "content": content}


def _message(raw: object, where: str, column: str) -> Message:
    said = raw.get("role", raw.get("from")) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(said, str) or said not in ROLES:
        raise UserError(f"{where} of column {column!r} needs a role: system, user, assistant or tool")
    role = ROLES[said]
    # A table gives every message the keys of all messages.
    present = {key: value for key, value in raw.items() if value is not None}
    calls = _calls(present, said, role, where)
    content = "" if said == "function_call" else _content(present, role, calls, where)
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    if reasoning := _reasoning(present, where):
        message["reasoning_content"] = reasoning
    if _weight(present, role, where) == 0:
        message["weight"] = 0
    return message | {key: value for key, value in present.items() if key not in CONSUMED}


def _content(raw: Mapping[str, object], role: str, calls: Sequence[Message], where: str) -> str:
    column = "value" if "value" in raw and "content" not in raw else "content"  # ShareGPT's key
    if column not in raw:
        if calls:
            return ""
        raise UserError(f"{where}: column {column!r} is missing")
    value = raw[column]
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}: part {i} of column {column!r}") for i, part in enumerate(value))
    if not isinstance(value, str):
        raise refused(value, "text", column, where)
    if not value.strip() and not calls and role != "tool":  # a tool may have nothing to say
        raise UserError(f"{where}: column {column!r} is empty")
    return value


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        return text
    raise UserError(f"{where} is of type {shown(kind)}; a language model reads parts of type 'text'")


def _reasoning(raw: Mapping[str, object], where: str) -> str:
    told = set()
    for key in REASONING:
        value = raw.get(key, "")
        if not isinstance(value, str):
            raise refused(value, "text", key, where)
        told |= {value} if value.strip() else set()  # one text under several keys is no fault
    if len(told) > 1:
        raise UserError(f"{where}: {', '.join(k for k in REASONING if k in raw)} say different things; keep one")
    return told.pop() if told else ""


def _weight(raw: Mapping[str, object], role: str, where: str) -> int:
    if "train_detail" in raw:
        raise UserError(f"{where}: 'train_detail' marks parts of a turn; llmq learns a turn whole, or not: weight: 0")
    weight = 1
    for key in WEIGHTS:
        value = raw.get(key, 1)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{where}: {key!r} is {shown(value)}; it is 0 (not to be learned) or 1")
        if raw.get(key) == 1 and role != "assistant" and key == "weight":
            raise UserError(f"{where}: 'weight' is 1 on a turn of role {role!r}; only the assistant's are learned")
        weight = min(weight, int(value))
    return weight


def _calls(raw: Mapping[str, object], said: str, role: str, where: str) -> list[Message]:
    calls = parsed(raw.get("tool_calls") or [], f"{where}: column 'tool_calls'")
    if said == "function_call":  # ShareGPT: the call is the turn's value
        calls = parsed(raw.get("value", raw.get("content")), f"{where}: column 'value'")
        calls = calls if isinstance(calls, list) else [calls]
    elif raw.get("function_call"):  # OpenAI, before there were several
        calls = [raw["function_call"]]
    if calls and role != "assistant":
        raise UserError(f"{where}: tool_calls on a turn of role {role!r}; only the assistant calls tools")
    if not isinstance(calls, list):
        raise refused(calls, "a list of calls", "tool_calls", where)
    return [_call(call, f"{where}: call {i} of column 'tool_calls'") for i, call in enumerate(calls)]


def _call(call: object, where: str) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None  # the function alone is a call, too
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise UserError(f"{where} is {shown(call)}; it has a function with a name and arguments")
    arguments = parsed(function.get("arguments"), f"{where}: arguments")  # OpenAI writes them as JSON within a text
    arguments = {} if arguments in ("", None) else arguments
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments are {shown(arguments)}, not an object")
    plain: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **plain} if isinstance(call.get("id"), str) else plain


def tools_of(row: Mapping[str, object], where: str) -> list[Message]:
    """The tools that a row offers, in the form of chat templates: the column `tools`, or OpenAI's older `functions`."""
    for column in ("tools", "functions"):
        value = parsed(row.get(column), f"{where}: column {column!r}")
        if not value:
            continue
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise refused(value, "a list of tools", column, where)
        # The older `functions` are what `tools` have under "function".
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
        for i, tool in enumerate(tools):
            if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
                raise UserError(f"{where}: tool {i} of column {column!r} has no function with a name")
        return tools
    return []


def history_of(value: object, where: str) -> list[Message]:
    """The earlier turns in Alpaca's `history`: pairs of question and answer, or messages."""
    value = parsed(value, f"{where}: column 'history'")
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return messages_of(value, "history", where)
    turns: list[Message] = []
    for i, pair in enumerate(value if isinstance(value, list) else [None]):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise UserError(f"{where}: column 'history': item {i} is no pair of a question and its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns
