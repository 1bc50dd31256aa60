"""Completions through a server: once each, in order, resumed, counted, and described."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.data.chat import ChatConfig
from megatron_attnedit.data.preprocess import PreprocessConfig, preprocess
from megatron_attnedit.errors import UserError
from megatron_attnedit.generate.run import GenerateConfig, generate
from megatron_attnedit.generate.server import reach
from megatron_attnedit.generate.settings import Sampling
from tests.support.chat import TOOLS, answer, user
from tests.support.forked import FORKED
from tests.support.stand_in_chat import StandIn, chatting, echo
from tests.support.tools import call_tool

COUNT = 40
ROWS = [{"messages": [user(f"question {i}")]} for i in range(COUNT)]


def write_prompts(folder, rows=ROWS):
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def ask(tmp_path):
    """A function that generates from a stand-in into a folder; returns numbers and rows."""

    def run(stand_in, output="out", rows=ROWS, concurrency=4, waits_s=(0, 0), **options):
        fields = {n: options.pop(n) for n in ("on_bad_row", "limit", "json_key") if n in options}
        sampling = Sampling(**options)
        config = GenerateConfig(
            prompts=[write_prompts(tmp_path, rows)], output=str(tmp_path / output),
            sampling=sampling, **fields,
        )  # fmt: skip
        model = reach(stand_in.url, None, sampling, concurrency)
        model.waits_s = waits_s
        (tmp_path / output).mkdir(exist_ok=True)
        return generate(config, model), rows_of(tmp_path / output)

    return run


def rows_of(folder, name="data.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def server():
    with chatting(StandIn()) as stand_in:
        yield stand_in


def test_every_prompt_once_and_in_order(ask, server, tmp_path):
    with_answer = {"messages": [user("question 3"), answer("old")]}  # the same prompt
    found, rows = ask(server, rows=[*ROWS, with_answer, ROWS[7]], temperature=0.7, top_k=5)
    assert found["prompts"] == found["rows"] == COUNT and found["duplicates"] == 2
    assert [row["messages"][0]["content"] for row in rows] == [
        f"question {i}" for i in range(COUNT)
    ]
    for row in rows:
        assert (
            row["messages"][-1]["content"]
            == f"{row['messages'][0]['content']} {row['seed'] % 1000}"
        )
    assert len({row["seed"] for row in rows}) == COUNT
    (first,) = (asked for asked in server.asked if asked["messages"] == ROWS[0]["messages"])
    assert first == {
        "model": "teacher", "messages": ROWS[0]["messages"], "max_tokens": 1024,
        "temperature": 0.7, "top_p": 1.0, "top_k": 5, "seed": rows[0]["seed"],
    }  # fmt: skip
    # A completion's seed is its own, whatever else is asked for.
    _, alone = ask(server, "alone", rows=[ROWS[9]], concurrency=1, temperature=0.7, top_k=5)
    assert alone == [rows[9]]
    _, other = ask(server, "other", rows=[ROWS[9]], seed=1)
    assert other[0]["seed"] != rows[9]["seed"]


def test_several_samples_and_what_is_left_out(ask, server, tmp_path):
    def chosen(asked):
        name = asked["messages"][-1]["content"]
        if name == "question 1":
            return "always the same"
        if name == "question 2":
            return {"message": {"content": "half a"}, "finish_reason": "length"}
        if name == "question 3":
            return ""
        if name == "question 4":
            return {"message": {"content": "x"}, "finish_reason": "content_filter"}
        return echo(asked)

    server.answer = chosen
    found, rows = ask(server, rows=ROWS[:6], samples=3)
    assert found["left_out"] == {
        "same as another of its prompt": 2,
        "cut off at --max-new-tokens": 3,
        "empty completion": 3,
        "ended by content_filter": 3,
    }
    assert found["rows"] == len(rows) == 7
    assert len({(row["id"], row["messages"][-1]["content"]) for row in rows}) == 7
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "7 completions of 6 prompts", "- model: teacher", "`prompts.jsonl`, ", "SHA-256 ",
        "- max new tokens: 1024", "- cut off at --max-new-tokens: 3", "data_files: data.jsonl",
    ):  # fmt: skip
        assert words in card
    before = len(server.asked)
    again, _ = ask(server, rows=ROWS[:6], samples=3)
    assert again == found and len(server.asked) == before  # nothing is asked twice


def test_thinking_and_tools(ask, server, tmp_path, chat_tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    server.answer = lambda asked: {
        "message": {"content": None, "reasoning": "hm", "tool_calls": [call]},
        "finish_reason": "tool_calls",
    }
    rows = [{"messages": [user("a?")], "tools": TOOLS}]
    _, (row,) = ask(server, rows=rows, chat_template_kwargs='{"enable_thinking": true}')
    assert server.asked[0]["tools"] == row["tools"] == TOOLS
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert row["messages"][1]["reasoning_content"] == "hm"
    config = PreprocessConfig(
        inputs=[str(tmp_path / "out" / "data.jsonl")], output=str(tmp_path / "data"),
        tokenizer=chat_tokenizer("qwen3"), chat=ChatConfig(),
    )  # fmt: skip
    # <think> \n hm \n </think> \n \n, the call between its marks, and the end of the turn.
    assert preprocess(config)["counted_tokens"] == 6 + 2 + 2 + 38 + 2 + 1


def test_a_server_that_goes_is_gone_on_with(ask, tmp_path):
    with chatting(StandIn()) as server:
        expected = ask(server, "whole", samples=2)
    gone = pytest.raises(UserError, match="--server http.*/v1/chat/completions: no answer")
    with chatting(StandIn(until=37)) as server, gone:
        ask(server, samples=2)
    data = tmp_path / "out" / "data.jsonl"
    there = rows_of(tmp_path / "out")
    assert 0 < len(there) < 2 * COUNT and not (tmp_path / "out" / "README.md").exists()
    with data.open("a") as file:  # what a kill leaves of a line
        file.write('{"id": "half')
    with chatting(StandIn()) as server:
        assert ask(server, samples=2, concurrency=7) == expected
        assert len(server.asked) == 2 * COUNT - len(there)
    for name in ("data.jsonl", "left_out.jsonl", "README.md", "settings.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_busy_server_is_asked_again(ask, server):
    seen = set()

    def busy(asked):
        name = asked["messages"][-1]["content"]
        return echo(asked) if name in seen else (seen.add(name), 503)[1]

    server.answer = busy
    found, rows = ask(server, rows=ROWS[:5])
    assert found["rows"] == 5 and len(server.asked) == 10
    server.answer = lambda asked: 503
    with pytest.raises(UserError, match="answers 503: .*the 503 of a test"):
        ask(server, "other", rows=ROWS[:5])


def test_prompts_that_are_refused(ask, server):
    server.answer = lambda asked: 400 if "2" in asked["messages"][-1]["content"] else echo(asked)
    with pytest.raises(BadRow, match=r"prompts.jsonl:3: --server .* answers 400: .*of a test"):
        ask(server, rows=ROWS[:5])
    found, _ = ask(server, rows=ROWS[:5], on_bad_row="skip")
    assert found["left_out"] == {"refused by the server": 1} and found["rows"] == 4
    assert found["bad_rows"] == {"refused by the server": 1}


def test_bad_rows_and_limits(ask, server):
    rows = [*ROWS[:2], {"messages": [user("a"), user("b")]}, {"messages": None}, *ROWS[2:4]]
    with pytest.raises(UserError, match="prompts.jsonl:3: message 2: two user turns in a row"):
        ask(server, rows=rows)
    found, _ = ask(server, rows=rows, on_bad_row="skip")
    assert found["bad_rows"] == {"turns out of order": 1, "null": 1} and found["rows"] == 4
    limited, rows = ask(server, "limited", limit=3)
    assert limited["prompts"] == len(rows) == 3
    more, rows = ask(server, "limited", limit=5)
    assert more["rows"] == len(rows) == 5
    with pytest.raises(UserError, match="no prompts"):
        ask(server, "none", rows=[])


def test_other_settings_and_foreign_folders(ask, server, tmp_path):
    ask(server, rows=ROWS[:2])
    for options, message in (
        ({"temperature": 0.5}, r"another temperature \(1.0, now 0.5\)"),
        ({"seed": 5}, "another seed"),
    ):
        with pytest.raises(UserError, match=message):
            ask(server, rows=ROWS[:2], **options)
    (tmp_path / "out" / "data.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="data.jsonl:1: not a row of this program"):
        ask(server, rows=ROWS[:2])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "data.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="data.jsonl without settings.json"):
        ask(server, "foreign")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0}, "--top-p 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"samples": 2, "temperature": 0}, "--temperature 0: --samples above 1"),
        ({"chat_template_kwargs": "5"}, "--chat-template-kwargs 5: expected a JSON object"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_what_is_no_server():
    for url, message in (("localhost", "expected http://HOST:PORT"), ("ftp://a", "expected http")):
        with pytest.raises(UserError, match=f"--server {url}: {message}"):
            reach(url, None, Sampling(), 1)


def test_the_tool(tmp_path, server):
    prompts = write_prompts(tmp_path)
    tool = ["tools/generate_data.py", "--prompts", prompts, "--output", tmp_path / "out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    for words, message in (
        (["--server", nobody], f"error: --server {nobody}/v1/models: no answer: "),
        ([], "error: --server and --model: expected one of the two"),
    ):
        done = call_tool(*tool, *words)
        assert done.returncode == 2 and done.stderr.startswith(message), done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    done = call_tool(*tool, "--server", server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}: 40 completions of 40 prompts\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "data.jsonl", "left_out.jsonl", "settings.json",
    ]  # fmt: skip


def test_a_kill_leaves_nothing_twice(tmp_path, server):
    prompts = write_prompts(tmp_path)
    words = ["--prompts", prompts, "--server", server.url, "--concurrency", "2", "--output"]
    assert call_tool("tools/generate_data.py", *words, tmp_path / "whole").returncode == 0

    def slow(asked):
        time.sleep(0.05)
        return echo(asked)

    server.answer = slow
    data = tmp_path / "out" / "data.jsonl"
    process = FORKED.Process(target=_killed, args=([*map(str, words), str(tmp_path / "out")],))
    process.start()
    until = time.monotonic() + 60
    while not (data.exists() and data.stat().st_size > 500) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 0 < len(data.read_text().splitlines()) < COUNT
    done = call_tool("tools/generate_data.py", *words, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert data.read_bytes() == (tmp_path / "whole" / "data.jsonl").read_bytes()


def _killed(words):
    import runpy
    import sys

    sys.argv = ["generate_data.py", *words]
    runpy.run_path(str(Path("tools") / "generate_data.py"), run_name="__main__")
