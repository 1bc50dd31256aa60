"""Rows to conversations: every known form, and one line for what is none."""

import json

import pytest

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.data.conversations import parse_conversation
from tests.support.chat import CALL, TOOLS, answer, user

ASKED = [{"role": "user", "content": "a?"}]
CALLED = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_forms_of_the_same_conversation():
    expected = [
        {"role": "system", "content": "s"},
        *ASKED,
        {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [CALLED]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "b"},
    ]
    system, tool = {"role": "developer", "content": "s"}, {"role": "ipython", "content": "3"}
    flat = {"name": "add", "arguments": {"a": 1}}
    call = answer(None, thinking="t", tool_calls=[flat])
    parts = [{"type": "reasoning", "reasoning": "t"}, {"type": "text", "text": ""}]
    share = [
        {"from": "human", "value": "a?"},
        {"from": "function_call", "value": json.dumps(flat), "reasoning": "t"},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "b"},
    ]
    for row in (
        {"messages": [system, *ASKED, call, tool, answer("b")]},
        {"messages": [system, *ASKED, answer(parts, tool_calls=[CALL]), tool, answer("b")]},
        {"conversations": [system, *ASKED, call, tool, answer("b")], "messages": None},
        {"system": "s", "conversations": share},
        {"system": "other", "conversations": [{"from": "system", "value": "s"}, *share]},
    ):
        assert parse_conversation("", row).messages == expected, row
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert parse_conversation(
            "", {"messages": [*ASKED, answer("b")], "tools": tools}
        ).tools == (TOOLS)
    assert parse_conversation("", {"x": [*ASKED, answer("b")], "tools": []}, "x").tools is None


def test_prompts():
    parsed = parse_conversation("", {"messages": ASKED}, with_completion=False)
    assert parsed.prompt() == ASKED
    longer = parse_conversation("", {"messages": [*ASKED, answer("b"), user("c?"), answer("d")]})
    assert longer.prompt() == [*ASKED, {"role": "assistant", "content": "b"}, user("c?")]


BAD = [
    ({}, "no key 'messages' or 'conversations' (--json-key); it has none", "without the key"),
    ({"messages": None}, "'messages' is null", "null"),
    ({"messages": []}, "'messages' is empty", "empty"),
    ({"messages": "a"}, "'messages' is not a list of messages", "not messages"),
    ({"messages": ["a"]}, "message 1 is not an object", "not messages"),
    ({"messages": [{"role": "robot", "content": ""}]}, "has the role 'robot'", "unknown role"),
    ({"messages": [{"content": "a"}]}, "message 1 has the role 'None'", "unknown role"),
    ({"messages": [user(5)]}, "message 1 has a content that is not text", "not text"),
    ({"messages": [user([{"type": "image"}])]}, "content that is not text", "not text"),
    ({"messages": [user("\ud800")]}, "half a surrogate pair", "not Unicode"),
    ({"messages": [user("a"), user("b")]}, "message 2: two user turns in a row", "turns"),
    ({"messages": [user("a"), answer("b"), answer("c")]}, "two assistant turns in a row", "turns"),
    ({"messages": [answer("b")]}, "the assistant's turn stands at the beginning", "turns"),
    ({"messages": [user("a"), {"role": "system", "content": ""}]}, "system's turn stands", "turns"),
    (
        {"messages": [user("a"), answer("b"), {"role": "tool", "content": "c"}]},
        "message 3: a tool's turn without a call before it",
        "turns",
    ),
    ({"messages": [{"role": "system", "content": "a"}]}, "no user's turn", "turns"),
    ({"messages": [user("a")]}, "no assistant's turn, hence nothing to learn", "no completion"),
    ({"messages": [user("a"), answer(" \n")]}, "message 2: empty completion", "empty completion"),
    ({"messages": [user("a"), answer(None)]}, "message 2: empty completion", "empty completion"),
    (
        {"messages": [user("a"), answer("", tool_calls=[{"function": {}}])]},
        "message 2 has a tool call without a name",
        "bad tool call",
    ),
    (
        {"messages": [user("a"), answer("", tool_calls=[{"name": "f", "arguments": "{"}])]},
        "message 2: a tool call's arguments is not JSON",
        "bad tool call",
    ),
    ({"messages": [user("a"), answer("b")], "tools": "["}, "'tools' is not JSON", "bad tools"),
    ({"messages": [user("a"), answer("b")], "tools": [1]}, "'tools' is not a list", "bad tools"),
]


@pytest.mark.parametrize(("row", "message", "kind"), BAD)
def test_rows_that_are_no_conversation(row, message, kind):
    with pytest.raises(BadRow) as caught:
        parse_conversation("a.jsonl:7", row)
    text = str(caught.value)
    assert text.startswith("a.jsonl:7: ") and message in text and "\n" not in text
    assert caught.value.kind.startswith(kind)
