"""Rows of chat data to conversations in the form of transformers' chat templates.

A row holds ``messages`` (objects with ``role`` and ``content``) or ``conversations`` (the same, or
ShareGPT's ``from`` and ``value``), and may hold ``tools`` and ``system``. Thinking comes as
``reasoning_content``, ``reasoning`` or ``thinking``, as a part of the content, or inside it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_attnedit.data.bad_rows import BadRow

MESSAGES = ("messages", "conversations")
COLUMNS = (*MESSAGES, "tools", "system")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
CALLS = ("function_call", "tool_call")  # roles whose text is the call
REASONING = ("reasoning_content", "reasoning", "thinking")
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Turns of system, user, assistant and tools.

    Attributes:
        where: File and row, for messages.
        messages: Each has ``role`` and ``content``, an assistant's also ``reasoning_content`` and
            ``tool_calls`` where it has any.
        tools: Descriptions of the tools, as in the row; None where there are none.
    """

    where: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def prompt(self) -> list[Message]:
        """The turns up to the last one that an assistant answers."""
        last = max(i for i, m in enumerate(self.messages) if m["role"] in ("user", "tool"))
        return self.messages[: last + 1]

    def characters(self) -> int:
        """Characters of all contents."""
        return sum(len(message["content"]) for message in self.messages)


def parse_conversation(
    where: str, row: Mapping[str, Any], key: str | None = None, *, with_completion: bool = True
) -> Conversation:
    """The conversation of a row.

    Args:
        where: File and row.
        row: What it holds.
        key: Key of the messages; None: the first of ``messages`` and ``conversations`` there is.
        with_completion: An assistant must have answered.

    Raises:
        BadRow: there are no messages, or they are not in an order that a chat can have.
    """
    turns = _turns(where, row, key)
    messages = [_message(f"{where}: message {i}", turn) for i, turn in enumerate(turns, start=1)]
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    _check_order(where, messages)
    if with_completion and messages[-1]["role"] != "assistant" and not _answers(messages):
        raise BadRow(f"{where}: no assistant's turn, hence nothing to learn", "no completion")
    return Conversation(where, messages, _tools(where, row.get("tools")))


def _answers(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "assistant"]


def _turns(where: str, row: Mapping[str, Any], key: str | None) -> list[Any]:
    keys = (key,) if key else MESSAGES
    there = [k for k in keys if k in row]
    if not there:
        wanted, names = " or ".join(map(repr, keys)), ", ".join(row) or "none"
        raise BadRow(f"{where}: no key {wanted} (--json-key); it has {names}", "without the key")
    found = next((k for k in there if row[k] is not None), None)
    if found is None:
        raise BadRow(f"{where}: {there[0]!r} is null", "null")
    if not isinstance(row[found], list):
        raise BadRow(f"{where}: {found!r} is not a list of messages", "not messages")
    if not row[found]:
        raise BadRow(f"{where}: {found!r} is empty", "empty")
    turns: list[Any] = row[found]
    return turns


def _message(where: str, turn: Any) -> Message:
    """One turn, with the names and fields of transformers.

    Raises:
        BadRow: it is none.
    """
    if not isinstance(turn, Mapping):
        raise BadRow(f"{where} is not an object", "not messages")
    given = turn.get("role", turn.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise BadRow(f"{where} has the role {str(given)[:40]!r}", "unknown role")
    content = turn.get("content", turn.get("value"))
    thinking, text = _texts(where, content)
    message: Message = {"role": role, "content": text}
    thinking = next((turn[k] for k in REASONING if isinstance(turn.get(k), str)), thinking)
    calls = turn.get("tool_calls")
    if given in CALLS:
        message["content"], calls = "", _json(where, text, "its call")
        calls = calls if isinstance(calls, list) else [calls]
    if role == "assistant" and thinking.strip():
        message["reasoning_content"] = thinking
    if role == "assistant" and calls:
        message["tool_calls"] = [_call(where, call) for call in calls]
    for name in ("name", "tool_call_id"):
        if isinstance(turn.get(name), str):
            message[name] = turn[name]
    return message


def _texts(where: str, content: Any) -> tuple[str, str]:
    """Thinking and text of a content: text, nothing, or a list of parts of either kind."""
    whole = "" if content is None else content
    parts = content if isinstance(content, list) else [{"type": "text", "text": whole}]
    found = {"thinking": "", "text": ""}
    for part in parts:
        given = str(part.get("type")) if isinstance(part, Mapping) else ""
        kind = "thinking" if given == "reasoning" else given
        # Of a column, a part has the keys of all kinds, null but for its own.
        text = next((part[k] for k in (given, "text") if part.get(k)), "") if kind in found else 0
        if not isinstance(text, str):
            raise BadRow(f"{where} has a content that is not text", "not text")
        found[kind] += text
    try:
        (found["thinking"] + found["text"]).encode()
    except UnicodeEncodeError as error:
        reason = "holds half a surrogate pair, not Unicode"
        raise BadRow(f"{where} {reason}", "not Unicode") from error
    return found["thinking"], found["text"]


def _call(where: str, call: Any) -> dict[str, Any]:
    """A tool call with arguments as an object: templates write them as JSON themselves."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where} has a tool call without a name", "bad tool call")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(where, arguments, "a tool call's arguments")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**found, "id": call["id"]} if isinstance(call.get("id"), str) else found


def _json(where: str, text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{where}: {what} is not JSON", "bad tool call") from None


def _tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow(f"{where}: 'tools' is not JSON", "bad tools") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"{where}: 'tools' is not a list of objects", "bad tools")
    return tools


# What may follow on what; a system's turn stands at the beginning.
FOLLOWS = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
KIND = "turns out of order"


def _check_order(where: str, messages: list[Message]) -> None:
    """Every turn follows on one that it can follow on, and no answer is empty.

    Raises:
        BadRow: names the first message that does not.
    """
    before: Message = {"role": ""}
    for number, message in enumerate(messages, start=1):
        place, role = f"{where}: message {number}", message["role"]
        if before["role"] == role and role != "tool":
            raise BadRow(f"{place}: two {role} turns in a row", KIND)
        if before["role"] not in FOLLOWS[role]:
            after = f"after the {before['role']}'s" if before["role"] else "at the beginning"
            raise BadRow(f"{place}: the {role}'s turn stands {after}", KIND)
        if role == "tool" and before["role"] == "assistant" and not before.get("tool_calls"):
            raise BadRow(f"{place}: a tool's turn without a call before it", KIND)
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"{place}: empty completion", "empty completion")
        before = message
    if all(message["role"] == "system" for message in messages):
        raise BadRow(f"{where}: no user's turn", KIND)
