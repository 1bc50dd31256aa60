"""Rows that are no document: the first stops, or all are left out and counted, in every format."""

import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.data.tokenizer import load_tokenizer
from megatron_attnedit.errors import UserError
from tests.support.tools import call_tool
from tests.unit.data.test_preprocess import documents, run

GOOD = ["the layer", "its teacher"]
LINES = b"".join(
    [
        b'{"text": "the layer"}\n',
        b'{"text": null}\n',
        b'{"text": ""}\n',
        b'{"body": "x"}\n',
        b'{"text": "\xff"}\n\n',
        b'{"text": 5}\n',
        b'{"text": "a\0b"}\n',
        b'["x"]\n',
        b'{"text": \n',
        b'{"text": "\\ud800"}\n',
        b'{"text": null}\n',
        b'{"text": "its teacher"}\n',
    ]
)
OF_LINES = {
    "not JSON": 1,
    "not UTF-8": 1,
    "not Unicode": 1,
    "not an object": 1,
    "not text": 2,
    "null": 2,
    "without the key": 1,
}


def columns(folder, name):
    """Null, empty, and bytes that are not UTF-8 where text is promised."""
    texts = pyarrow.array([b"the layer", None, b"", b"caf\xe9", b"its teacher"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), texts.buffers())
    table = pyarrow.table({"text": texts, "other": [1, 2, 3, 4, 5]})
    file = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    return file


@pytest.mark.parametrize("workers", [1, 2])
def test_lines(tmp_path, hf_tokenizer, workers, caplog):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    source = [str(tmp_path / "a.jsonl")]
    with pytest.raises(UserError, match=r"a.jsonl:2: 'text' is not text"):
        run(tmp_path, source, hf_tokenizer, workers=workers)
    found, prefix = run(tmp_path, source, hf_tokenizer, on_bad_row="skip", workers=workers)
    kind = load_tokenizer(hf_tokenizer)
    assert [kind.decode(ids[:-1]) for ids in documents(prefix)] == GOOD
    assert found["bad_rows"] == OF_LINES
    assert (found["documents"], found["empty_documents"]) == (2, 1)
    shown = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(shown) == len(OF_LINES)  # the first of each kind
    assert sum("a.jsonl:2: " in line for line in shown) == 1


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns(tmp_path, hf_tokenizer, name):
    source = [str(columns(tmp_path, name))]
    with pytest.raises(UserError, match=f"{name}:2: 'text' is not text"):
        run(tmp_path, source, hf_tokenizer)
    found, prefix = run(tmp_path, source, hf_tokenizer, on_bad_row="skip")
    kind = load_tokenizer(hf_tokenizer)
    assert [kind.decode(ids[:-1]) for ids in documents(prefix)] == GOOD
    assert found["bad_rows"] == {"not UTF-8": 1, "null": 1}
    with pytest.raises(UserError, match="1: no key 'body'"):  # of no row: not a bad row
        run(tmp_path, source, hf_tokenizer, "out2", json_key="body", on_bad_row="skip")


def test_what_is_left_is_nothing(tmp_path, hf_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"body": "x"}\n')
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    for name, words in {"a.jsonl": "1 null, 1 without the key", "a.txt": "1 not UTF-8"}.items():
        with pytest.raises(UserError, match=f"no tokens; left out: . bad rows .{words}") as caught:
            run(tmp_path, [str(tmp_path / name)], hf_tokenizer, on_bad_row="skip")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--on-bad-row maybe: expected one of stop, skip"):
        run(tmp_path, [], hf_tokenizer, on_bad_row="maybe")


def test_a_bad_row_travels_between_processes():
    row = pickle.loads(pickle.dumps(BadRow("a.jsonl:1: null", "null")))
    assert (str(row), row.kind) == ("a.jsonl:1: null", "null")


def test_the_tool(tmp_path, hf_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    tool = ["tools/preprocess_data.py", "--tokenizer", hf_tokenizer]
    tool += ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "out"]
    stopped = call_tool(*tool)
    assert (stopped.returncode, stopped.stdout) == (2, "")
    assert f"error: {tmp_path}/a.jsonl:2: 'text' is not text\n" in stopped.stderr
    done = call_tool(*tool, "--on-bad-row", "skip")
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stdout and "left out: 9 bad rows (1 not JSON, " in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["bad_rows"] == OF_LINES
