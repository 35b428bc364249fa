"""Conversations in the forms that people write them in -> messages as chat templates take them.

A message has a `role` (system, user, assistant, tool), `content`, and where they are said `tool_calls`,
`reasoning_content`, and `weight: 0` for a turn of the assistant that is not to be learned. Other keys stay as they are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmq.data import strict_json
from llmq.data.strict_json import shown
from llmq.errors import UserError

Message = dict[str, Any]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
ROLES |= {"developer": "system", "human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant"}
ROLES |= {"model": "assistant", "function": "tool", "observation": "tool", "ipython": "tool"}
ROLES |= {"function_call": "assistant"}
"""What a turn is called -> what chat templates call it: OpenAI's, ShareGPT's and Gemma's names."""

REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = ("weight", "train", "training", "loss")
"""What says that a turn of the assistant is not to be learned: 0 or false."""
CONSUMED = {"role", "from", "content", "value", "tool_calls", "function_call", *REASONING, *WEIGHTS}


def parsed(value: Any, where: str) -> Any:
    """A value, read first if it is JSON within a text, as in a column of a CSV file."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return strict_json.parse(value.strip())[0]
    except (json.JSONDecodeError, strict_json.NotPlain) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def messages_of(value: Any, column: str, where: str) -> list[Message]:
    """The messages in a column, each brought into one form. Raises `UserError` for what has no such form."""
    value = parsed(value, f"{where}: column {column!r}")
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: column {column!r} is not a list of messages")
    return [_message(message, f"{where}: message {i}", column) for i, message in enumerate(value)]


def learned(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's and is to be learned."""
    return message["role"] == "assistant" and message.get("weight") != 0


def check_learned(messages: Sequence[Message], column: str, where: str) -> None:
    """Raise `UserError` for a conversation with nothing to learn from."""
    if not any(map(learned, messages)):
        raise UserError(f"{where}: column {column!r} has no assistant message to learn from")


def _message(raw: Any, where: str, column: str) -> Message:
    said = raw.get("role", raw.get("from")) if isinstance(raw, dict) else None
    if not isinstance(said, str) or said not in ROLES:
        raise UserError(f"{where} of column {column!r} needs a role: system, user, assistant or tool")
    role = ROLES[said]
    present = {key: value for key, value in raw.items() if value is not None}
    calls = _calls(present, said, role, where)
    made: Message = {"role": role, "content": "" if said == "function_call" else _content(present, role, calls, where)}
    if calls:
        made["tool_calls"] = calls
    if reasoning := _reasoning(present, where):
        made["reasoning_content"] = reasoning
    if _weight(present, role, where) == 0:
        made["weight"] = 0
    return made | {key: value for key, value in present.items() if key not in CONSUMED}


def _content(raw: Mapping[str, Any], role: str, calls: Sequence[Any], where: str) -> str:
    column = "value" if "value" in raw and "content" not in raw else "content"
    if column not in raw:
        if calls:
            return ""
        raise UserError(f"{where}: column {column!r} is missing")
    value = raw[column]
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}: part {i} of column {column!r}") for i, part in enumerate(value))
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {shown(value)}, not text")
    if not value.strip() and not calls and role != "tool":  # a tool may have nothing to say
        raise UserError(f"{where}: column {column!r} is empty")
    return value


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        return text
    raise UserError(f"{where} is of type {shown(kind)}; a language model reads parts of type 'text'")


def _reasoning(raw: Mapping[str, Any], where: str) -> str:
    for key in REASONING:
        if key in raw and not isinstance(raw[key], str):
            raise UserError(f"{where}: column {key!r} is {shown(raw[key])}, not text")
    told = {raw[key] for key in REASONING if raw.get(key, "").strip()}
    if len(told) > 1:
        raise UserError(f"{where}: {', '.join(k for k in REASONING if k in raw)} say different things; keep one")
    return str(told.pop()) if told else ""


def _weight(raw: Mapping[str, Any], role: str, where: str) -> int:
    if "train_detail" in raw:
        raise UserError(f"{where}: 'train_detail' marks parts of a turn; llmq learns a turn whole, or not: weight: 0")
    weight = 1
    for key in WEIGHTS:
        if key not in raw:
            continue
        if not isinstance(raw[key], bool | int | float) or raw[key] not in (0, 1):
            raise UserError(f"{where}: {key!r} is {shown(raw[key])}; it is 0 (not to be learned) or 1")
        if raw[key] == 1 and role != "assistant" and key == "weight":
            raise UserError(f"{where}: 'weight' is 1 on a turn of role {role!r}; only the assistant's are learned")
        weight = min(weight, int(raw[key]))
    return weight


def _calls(raw: Mapping[str, Any], said: str, role: str, where: str) -> list[Message]:
    calls = parsed(raw.get("tool_calls") or [], f"{where}: column 'tool_calls'")
    if said == "function_call":  # ShareGPT: the call is the turn's value
        calls = parsed(raw.get("value", raw.get("content")), f"{where}: column 'value'")
        calls = calls if isinstance(calls, list) else [calls]
    elif raw.get("function_call"):  # OpenAI, before there were several
        calls = [raw["function_call"]]
    if calls and role != "assistant":
        raise UserError(f"{where}: tool_calls on a turn of role {role!r}; only the assistant calls tools")
    if not isinstance(calls, list):
        raise UserError(f"{where}: column 'tool_calls' is {shown(calls)}, not a list of calls")
    return [_call(call, f"{where}: call {i} of column 'tool_calls'") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(f"{where} is {shown(call)}; it has a function with a name and arguments")
    arguments = parsed(function.get("arguments", {}), f"{where}: arguments")
    if arguments in ("", None):
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments are {shown(arguments)}, not an object")
    made: Message = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def tools_of(row: Mapping[str, Any], where: str) -> list[Any]:
    """The tools that a row offers: its column `tools`, or OpenAI's older `functions`."""
    for column in ("tools", "functions"):
        value = parsed(row.get(column), f"{where}: column {column!r}")
        if not value:
            continue
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise UserError(f"{where}: column {column!r} is {shown(value)}, not a list of tools")
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
        for i, tool in enumerate(tools):
            if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
                raise UserError(f"{where}: tool {i} of column {column!r} has no function with a name")
        return tools
    return []


def history_of(value: Any, where: str) -> list[Message]:
    """The turns before, from Alpaca's `history`: pairs of what was asked and answered, or messages."""
    value = parsed(value, f"{where}: column 'history'")
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return messages_of(value, "history", where)
    made: list[Message] = []
    for i, pair in enumerate(value if isinstance(value, list) else [None]):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise UserError(f"{where}: column 'history': item {i} is no pair of a question and its answer")
        made += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return made
