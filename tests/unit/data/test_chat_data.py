"""Chat data on disk: the mask beside the tokens, written, checked, blended, read and resumed."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_attnedit.data.chat import ChatConfig
from megatron_attnedit.data.datasets import (
    DataConfig,
    batches,
    build_datasets,
    check_train_data,
    data_identity,
)
from megatron_attnedit.data.preprocess import PreprocessConfig, preprocess
from megatron_attnedit.data.tokenizer import load_tokenizer
from megatron_attnedit.errors import UserError
from tests.support.chat import CONVERSATIONS, answer, user
from tests.support.tools import call_tool

ROWS = [row for row, counts in CONVERSATIONS if counts[2]]
COUNTED = sum(counts[2] for _, counts in CONVERSATIONS)
SEQ = 48


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def make_chat(tmp_path_factory, chat_tokenizer):
    """A function that writes rows as chat data and returns description and prefix."""

    def make(rows=ROWS, name="chat", tokenizer=None, **options):
        folder = tmp_path_factory.mktemp(name)
        source = write_rows(folder / "a.jsonl", rows)
        options = {"chat": ChatConfig(), "tokenizer": chat_tokenizer("smollm2"), **options}
        config = PreprocessConfig(inputs=[source], output=str(folder / name), **options)
        return preprocess(config), str(folder / name)

    return make


def masks_of(prefix):
    data = IndexedDataset(prefix + ".loss_mask")
    return [data[i].copy() for i in range(len(data))]


def content(prefix):
    suffixes = (".bin", ".idx", ".loss_mask.bin", ".loss_mask.idx")
    return [Path(prefix + suffix).read_bytes() for suffix in suffixes]


def test_the_mask_is_a_byte_a_token(make_chat, chat_tokenizer):
    description, prefix = make_chat()
    tokens, masks = IndexedDataset(prefix), masks_of(prefix)
    assert [len(tokens[i]) for i in range(len(tokens))] == [len(mask) for mask in masks]
    assert {mask.dtype for mask in masks} == {np.dtype(np.uint8)}
    assert sum(int(mask.sum()) for mask in masks) == COUNTED == description["counted_tokens"]
    assert Path(prefix + ".loss_mask.bin").stat().st_size == description["tokens"]
    assert description == json.loads(Path(prefix + ".json").read_text())
    assert description["chat"]["loss_on"] == "completion"
    assert description["chat_counts"]["thinking_left_out"] == 3
    kind = load_tokenizer(chat_tokenizer("smollm2"))
    assert {int(tokens[i][-1]) for i in range(len(tokens))} == {kind.eod}
    assert not any(mask[-1] for mask in masks)


def test_workers_and_formats_change_nothing(make_chat, tmp_path, monkeypatch, chat_tokenizer):
    _, prefix = make_chat()
    expected = content(prefix)
    monkeypatch.setattr("megatron_attnedit.data.preprocess.CHUNK_BYTES", 9)
    assert content(make_chat(workers=2)[1]) == expected
    # Columns have all keys of all rows, null where a row has none.
    turns = [ROWS[3]["messages"], ROWS[0]["messages"]]
    table = pyarrow.Table.from_pylist([{"messages": turn, "id": 5} for turn in turns])
    assert "reasoning_content" in table.column("messages")[1].as_py()[0]
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    config = {"tokenizer": chat_tokenizer("smollm2"), "chat": ChatConfig()}
    inputs = [str(tmp_path / "a.parquet")]
    preprocess(PreprocessConfig(inputs=inputs, output=str(tmp_path / "p"), **config))
    assert content(str(tmp_path / "p")) == content(make_chat([ROWS[3], ROWS[0]])[1])
    text = tmp_path / "a.txt"
    text.write_text("x")
    with pytest.raises(UserError, match="a.txt: text has no messages"):
        preprocess(PreprocessConfig(inputs=[str(text)], output=str(tmp_path / "q"), **config))


def test_loss_on_all_writes_no_mask_and_removes_an_old_one(make_chat, tmp_path, chat_tokenizer):
    source = write_rows(tmp_path / "a.jsonl", ROWS)
    config = {"inputs": [source], "output": str(tmp_path / "out"), "overwrite": True}
    config["tokenizer"] = chat_tokenizer("smollm2")
    preprocess(PreprocessConfig(**config, chat=ChatConfig()))
    assert (tmp_path / "out.loss_mask.idx").exists()
    found = preprocess(PreprocessConfig(**config, chat=ChatConfig(loss_on="all")))
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.bin", "out.idx", "out.json"]
    assert "counted_tokens" not in found
    assert (tmp_path / "out.bin").read_bytes() == content(make_chat()[1])[0]


@pytest.fixture
def config(tmp_path, make_chat, chat_tokenizer):
    def make(**changes):
        defaults = {
            "seq_length": SEQ,
            "seed": 1,
            "vocab_size": load_tokenizer(chat_tokenizer("smollm2")).vocab_size,
            "data_cache_path": str(tmp_path / "cache"),
        }
        return DataConfig(**{**defaults, **changes})

    return make


def plain(tmp_path, tokenizer, texts):
    rows = [{"text": text} for text in texts]
    source = write_rows(tmp_path / "plain.jsonl", rows)
    prefix = str(tmp_path / "plain")
    preprocess(PreprocessConfig(inputs=[source], output=prefix, tokenizer=tokenizer))
    return prefix


def followed_by(prefix):
    """For every stretch of SEQ + 1 tokens in the data, in any order of documents: its mask."""
    tokens, masks = IndexedDataset(prefix), masks_of(prefix)
    return [(tokens[i].tolist(), masks[i].tolist()) for i in range(len(tokens))]


def expected_mask(sample, documents):
    """The labels' mask of a sample, found by its documents' tokens alone."""
    text = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
    eod = documents[0][0][-1]
    starts = [0, *(i + 1 for i, token in enumerate(text) if token == eod and i + 1 < len(text))]
    found = []
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        part = text[start:end]
        (mask,) = {
            tuple(mask[at : at + len(part)])
            for ids, mask in documents
            for at in (range(len(ids)) if start == 0 else [0])
            if ids[at : at + len(part)] == part
        }
        found += mask
    return found[1:]


def test_samples_have_the_mask_of_their_labels(make_chat, config):
    # Every document begins with its own number, so that any stretch is found once.
    rows = [
        {"messages": [user(f"q{i:02d}" * 3), answer(f"a{i:02d}" * (1 + i % 5))]} for i in range(20)
    ]
    _, prefix = make_chat(rows)
    dataset, _ = build_datasets(
        config(train_data_path=[prefix], seq_length=150), train_samples=30, valid_samples=0
    )
    documents, counted = followed_by(prefix), 0
    for i in range(30):
        mask = dataset[i]["loss_mask"]
        assert mask.dtype == torch.float32
        assert mask.tolist() == expected_mask(dataset[i], documents), i
        counted += int(mask.sum())
    assert counted > 100


def test_a_blend_of_masked_and_unmasked_data(
    one_process, make_chat, config, tmp_path, chat_tokenizer
):
    _, chat = make_chat()
    text = plain(tmp_path, chat_tokenizer("smollm2"), ["@" * 40] * 40)
    blend = config(
        train_data_path=["0.5", chat, "0.5", text], valid_data_path=[chat], seq_length=20
    )
    train, valid = build_datasets(blend, train_samples=40, valid_samples=6)
    is_text = [bool((train[i]["tokens"] == train[i]["tokens"][3]).sum() > 15) for i in range(40)]
    assert 15 < sum(is_text) < 25
    for i in range(40):
        counted = train[i]["loss_mask"].sum()
        assert counted == 20 if is_text[i] else counted < 20
    assert 0 < sum(valid[i]["loss_mask"].sum() for i in range(6)) < 6 * 20
    assert set(data_identity(blend)) == {chat, text}
    assert "loss_mask_sha256" in data_identity(blend)[chat]


def test_end_of_document_and_mask_together(make_chat, config):
    _, prefix = make_chat()
    for asked in (False, True):
        changed = config(train_data_path=[prefix], eod_mask_loss=asked)
        dataset, _ = build_datasets(changed, train_samples=8, valid_samples=0)
        found = torch.stack([dataset[i]["loss_mask"] for i in range(8)])
        assert 0 < found.sum() < found.numel()
        if asked:
            eods = torch.stack([dataset[i]["tokens"] == 0 for i in range(8)])
            assert not found[eods].any()


def test_resume_reads_the_same_masks(make_chat, config):
    _, prefix = make_chat()
    dataset, _ = build_datasets(config(train_data_path=[prefix]), train_samples=12, valid_samples=0)

    def masks(rank, size, consumed, workers=0):
        found = batches(
            dataset,
            micro_batch_size=2,
            data_parallel_rank=rank,
            data_parallel_size=size,
            consumed_samples=consumed,
            num_workers=workers,
        )
        return [batch.loss_mask for batch in found]

    whole = torch.cat(masks(0, 1, 0))
    assert torch.equal(torch.cat(masks(0, 1, 6)), whole[6:])
    assert torch.equal(torch.cat(masks(0, 1, 6, workers=1)), whole[6:])
    both = zip(masks(0, 2, 4), masks(1, 2, 4), strict=True)
    joined = torch.cat([mask for pair in both for mask in pair])
    assert torch.equal(joined, whole[4 : 4 + len(joined)]) and len(joined)


def test_damaged_masks(make_chat, config):
    def refused(change, message):
        _, prefix = make_chat()
        change(prefix)
        with pytest.raises(UserError, match=message) as caught:
            check_train_data(config(train_data_path=[prefix]))
        assert str(caught.value).startswith(f"--train-data-path {prefix}: ")
        assert "\n" not in str(caught.value)

    def described(prefix, **fields):
        file = Path(prefix + ".json")
        found = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    other = make_chat(ROWS[1:])[1]
    files = {name: Path(other + f".loss_mask.{name}").read_bytes() for name in ("bin", "idx")}

    def put(name, content):
        return lambda prefix: Path(prefix + f".loss_mask.{name}").write_bytes(content)

    refused(lambda p: os.remove(p + ".loss_mask.bin"), "loss_mask.bin is missing: .* has a mask")
    refused(lambda p: os.remove(p + ".loss_mask.idx"), "loss_mask.idx is missing: .* has a mask")
    refused(put("bin", files["bin"]), "do not fit .*: not a byte for every token")
    refused(put("idx", files["idx"]), "do not fit .*: not a byte for every token")
    refused(put("idx", b"garbage"), "loss_mask.idx is damaged")
    refused(lambda p: described(p, loss_mask_sha256=None), "is there, but .*.json has no mask")

    _, prefix = make_chat()
    file = Path(prefix + ".loss_mask.bin")
    file.write_bytes(b"\7" * file.stat().st_size)
    dataset, _ = build_datasets(config(train_data_path=[prefix]), train_samples=1, valid_samples=0)
    with pytest.raises(UserError, match="loss_mask.bin: sample 0 has 7, expected 0 or 1"):
        dataset[0]


def test_the_tool(tmp_path, chat_tokenizer, hf_tokenizer):
    bad = {
        "two.jsonl": ({"messages": [user("a"), user("b")]}, "message 2: two user turns in a row"),
        "empty.jsonl": ({"messages": [user("a"), answer("")]}, "message 2: empty completion"),
    }
    tool = ["tools/preprocess_data.py", "--output", tmp_path / "out", "--messages"]
    tokenizer = ["--tokenizer", chat_tokenizer("smollm2")]
    for name, (row, message) in bad.items():
        source = write_rows(tmp_path / name, [row])
        refused = call_tool(*tool, *tokenizer, "--input", source)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1] == f"error: {source}:1: {message}"
    source = write_rows(tmp_path / "a.jsonl", [*ROWS, bad["two.jsonl"][0]])
    refused = call_tool(*tool, "--tokenizer", hf_tokenizer, "--input", source)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        f"error: --tokenizer {hf_tokenizer}: the tokenizer has no chat template; "
        "--chat-template names a file"
    )
    refused = call_tool(*tool[:-1], *tokenizer, "--input", source, "--show", 1)
    assert refused.returncode == 2 and "only with --messages" in refused.stderr
    assert not list(tmp_path.glob("out*"))
    flags = ["--on-bad-row", "skip", "--show", 3, "--seq-length", 85]
    done = call_tool(*tool, *tokenizer, "--input", source, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\u00ab") == 3 and "\u00ab4<|im_end|>\u00bb" in done.stdout
    assert f"--- {source}:1: 2 of " in done.stdout
    assert "over long 2, truncated tokens 6" in done.stdout
    assert "left out: 1 bad rows (1 turns out of order)" in done.stdout
    assert "tokens count (" in done.stdout
