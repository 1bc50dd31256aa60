import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_attnedit.data.preprocess import PreprocessConfig, preprocess
from megatron_attnedit.data.tokenizer import load_tokenizer
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.text import token_windows
from tests.support.tokenizers import corpus
from tests.support.tools import call_tool

ROOT = Path(__file__).parents[3]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def run(tmp_path, inputs, tokenizer, name="out", **options):
    config = PreprocessConfig(
        inputs=inputs, output=str(tmp_path / name), tokenizer=tokenizer, **options
    )
    return preprocess(config), str(tmp_path / name)


def documents(prefix):
    data = IndexedDataset(prefix)
    return [data[i].tolist() for i in range(len(data))]


def test_tokens_round_trip_in_both_tokenizers(tmp_path, hf_tokenizer, sentencepiece_model):
    texts = corpus(20)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for tokenizer in (hf_tokenizer, sentencepiece_model):
        name = Path(tokenizer).name
        description, prefix = run(tmp_path, [source], tokenizer, name)
        kind = load_tokenizer(tokenizer)
        found = documents(prefix)
        assert [kind.decode(ids[:-1]) for ids in found] == texts
        assert {ids[-1] for ids in found} == {kind.eod}
        assert IndexedDataset(prefix).index.dtype is np.uint16
        assert description == json.loads(Path(prefix + ".json").read_text())
        assert description["documents"] == 20
        assert description["tokens"] == sum(map(len, found))
        assert description["vocab_size"] == kind.vocab_size
        assert description["tokenizer_sha256"] == kind.fingerprint()
        content = Path(prefix + ".bin").read_bytes()
        assert description["bin_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_document_ends_with_the_token_for_documents_not_for_turns(hf_tokenizer):
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(hf_tokenizer)
    kind = load_tokenizer(hf_tokenizer)
    assert stock.eos_token == "<|im_end|>"
    assert kind.eod == stock.convert_tokens_to_ids("<|endoftext|>") != stock.eos_token_id
    assert kind.encode("the layer") == stock.encode("the layer", add_special_tokens=False)
    assert kind.vocab_size == len(stock)


def test_evaluation_reads_text_as_training_does(tmp_path, hf_tokenizer):
    from transformers import AutoTokenizer

    (tmp_path / "a.jsonl").write_text('{"text": "the layer"}\n{"text": "the head"}\n')
    stock, kind = AutoTokenizer.from_pretrained(hf_tokenizer), load_tokenizer(hf_tokenizer)
    windows = token_windows(tmp_path / "a.jsonl", stock, 3, 1)
    assert windows.tolist() == [[*kind.encode("the layer"), kind.eod, kind.encode("the")[0]]]


def test_workers_change_nothing(tmp_path, hf_tokenizer, monkeypatch):
    monkeypatch.setattr("megatron_attnedit.data.preprocess.CHUNK_BYTES", 200)
    source = write_jsonl(tmp_path / "a.jsonl", corpus(300))
    _, one = run(tmp_path, [source], hf_tokenizer, "one")
    _, two = run(tmp_path, [source], hf_tokenizer, "two", workers=2)
    for suffix in (".bin", ".idx"):
        assert Path(one + suffix).read_bytes() == Path(two + suffix).read_bytes()


def test_every_kind_of_file_gives_the_same_tokens(tmp_path, hf_tokenizer):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    texts = corpus(6)
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    content = Path(plain).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    frames = [zstandard.compress(part) for part in (content[:99], content[99:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    _, prefix = run(tmp_path, [plain], hf_tokenizer, "expected")
    expected = documents(prefix)
    assert len(expected) == 6
    for i, name in enumerate(("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "?.txt")):
        _, prefix = run(tmp_path, [str(tmp_path / name)], hf_tokenizer, f"out{i}")
        assert documents(prefix) == expected, name


def test_a_data_set_of_the_datasets_library(tmp_path, hf_tokenizer):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("body\nthe layer\nits teacher\n")
    script = (
        "import sys; from megatron_attnedit.data.preprocess import *;"
        "preprocess(PreprocessConfig(inputs=['hf:' + sys.argv[1]], output=sys.argv[2],"
        "tokenizer=sys.argv[3], json_key='body', dataset=DatasetOptions(streaming=True)))"
    )
    arguments = [str(folder), str(tmp_path / "out"), hf_tokenizer]
    # A process of its own: the library's cache folder is read at import.
    env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=ROOT, env=env)
    kind = load_tokenizer(hf_tokenizer)
    assert [kind.decode(ids[:-1]) for ids in documents(str(tmp_path / "out"))] == [
        "the layer",
        "its teacher",
    ]


def test_no_append_eod_and_another_key(tmp_path, hf_tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", ["the layer", "", "  \n"], key="body")
    description, prefix = run(tmp_path, [source], hf_tokenizer, json_key="body", append_eod=False)
    kind = load_tokenizer(hf_tokenizer)
    assert documents(prefix) == [kind.encode("the layer"), kind.encode("  \n")]
    assert (description["documents"], description["empty_documents"]) == (2, 1)


# Without the time of day: processes that share the tests must see the same names.
HALF_AN_ARCHIVE = gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9]
BAD_INPUTS = [
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl:2: no key 'text'"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl:3: not JSON"),
    ("a.jsonl", b'["x"]\n', "a.jsonl:1: expected an object"),
    ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: 'text' is not text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: holds half a surrogate pair"),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8"),
    ("a.jsonl", b"", "no text, hence no tokens"),
    ("a.txt", b"", "no text, hence no tokens"),
    ("a.txt", b"caf\xe9", "a.txt: not UTF-8"),
    ("a.jsonl.gz", b"no archive", "a.jsonl.gz: cannot be read"),
    ("a.jsonl.gz", HALF_AN_ARCHIVE, "a.jsonl.gz: cannot be read"),
    ("a.jsonl.zst", b"no archive", "a.jsonl.zst: cannot be read"),
    ("a.parquet", b"no table", "a.parquet: "),
    ("a.pdf", b"x", "a.pdf: unknown extension"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_INPUTS)
def test_bad_input_leaves_nothing_behind(tmp_path, hf_tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        run(tmp_path, [str(tmp_path / name)], hf_tokenizer, workers=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]


def test_bad_tokenizers_and_paths(tmp_path, hf_tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    (tmp_path / "bad.model").write_text("no model")
    for name, message in {
        "missing": "no such directory",
        "empty": "holds no tokenizer.json",
        "damaged": "cannot be read",
        "bad.model": "not a SentencePiece model",
        "a.jsonl": "expected a directory or a SentencePiece",
    }.items():
        with pytest.raises(UserError, match=message):
            run(tmp_path, [source], str(tmp_path / name))
    with pytest.raises(UserError, match="nothing.jsonl: no such file"):
        run(tmp_path, [str(tmp_path / "nothing.jsonl")], hf_tokenizer)
    with pytest.raises(UserError, match="not a file"):
        run(tmp_path, [str(tmp_path)], hf_tokenizer)
    with pytest.raises(UserError, match="--output"):
        run(tmp_path, [source], hf_tokenizer, "a.jsonl/out")


def test_existing_output_stays_unless_overwritten(tmp_path, hf_tokenizer):
    first = write_jsonl(tmp_path / "a.jsonl", ["the layer"])
    second = write_jsonl(tmp_path / "b.jsonl", ["its teacher"])
    bad = write_jsonl(tmp_path / "c.jsonl", ["x"], key="body")
    _, prefix = run(tmp_path, [first], hf_tokenizer)
    before = documents(prefix)
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path, [second], hf_tokenizer)
    with pytest.raises(UserError, match="no key"):
        run(tmp_path, [second, bad], hf_tokenizer, overwrite=True)
    assert documents(prefix) == before
    run(tmp_path, [second], hf_tokenizer, overwrite=True)
    assert documents(prefix) != before


def test_command_line(tmp_path, hf_tokenizer):
    tool = ["tools/preprocess_data.py", "--tokenizer", hf_tokenizer]
    tool += ["--output", str(tmp_path / "out"), "--input"]
    missing = call_tool(*tool, "nothing.jsonl")
    assert missing.returncode == 2
    assert missing.stderr == "error: --input nothing.jsonl: no such file\n"
    source = write_jsonl(tmp_path / "a.jsonl", corpus(5))
    done = call_tool(*tool, source)
    assert done.returncode == 0, done.stderr
    assert "5 documents" in done.stdout
    assert "MB/s" in done.stderr
