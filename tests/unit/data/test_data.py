import gc
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_attnedit.data.calibration import calibration_data
from megatron_attnedit.data.datasets import (
    Batch,
    batches,
    build_datasets,
    check_train_data,
    data_identity,
)
from megatron_attnedit.data.preprocess import PreprocessConfig, preprocess
from megatron_attnedit.data.tokenizer import load_tokenizer
from megatron_attnedit.errors import UserError
from tests.support import processes
from tests.support.thinning import every_other
from tests.support.tokenizers import corpus
from tests.unit.data.conftest import SEQ


def order(dataset, *, mbs=2, rank=0, size=1, consumed=0, workers=0):
    found = batches(
        dataset,
        micro_batch_size=mbs,
        data_parallel_rank=rank,
        data_parallel_size=size,
        consumed_samples=consumed,
        num_workers=workers,
    )
    return [batch.tokens for batch in found]


def test_batches_are_the_samples_in_order(config):
    dataset, valid = build_datasets(config(), train_samples=20, valid_samples=0)
    assert valid is None and len(dataset) >= 20
    (first, *_) = batches(
        dataset, micro_batch_size=3, data_parallel_rank=0, data_parallel_size=1, consumed_samples=4
    )
    assert isinstance(first, Batch)
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert getattr(first, name).shape == (3, SEQ)
        for row in range(3):
            assert torch.equal(getattr(first, name)[row], dataset[4 + row][name])
    assert torch.equal(first.labels[:, :-1], first.tokens[:, 1:])
    assert torch.equal(first.position_ids, torch.arange(SEQ).expand(3, SEQ))
    assert first.loss_mask.eq(1).all()
    assert first.to(torch.device("meta")).labels.device.type == "meta"


@pytest.mark.parametrize(("workers", "size"), every_other([0, 1], [1, 2]))
def test_resume_is_exact_at_any_sample_and_width(config, size, workers):
    dataset, _ = build_datasets(config(), train_samples=21, valid_samples=0)
    samples = torch.stack([dataset[i]["tokens"] for i in range(len(dataset))])
    assert len({tuple(row.tolist()) for row in samples}) > 15
    for consumed in range(0, len(dataset), 1 if workers == 0 else 10):
        per_rank = [
            order(dataset, rank=r, size=size, consumed=consumed, workers=workers)
            for r in range(size)
        ]
        rounds = (len(dataset) - consumed) // (2 * size)
        assert [len(found) for found in per_rank] == [rounds] * size
        if rounds:
            joined = torch.cat([tokens for step in zip(*per_rank, strict=True) for tokens in step])
            assert torch.equal(joined, samples[consumed : consumed + 2 * size * rounds])


def test_reading_leaves_the_global_random_state_alone(config):
    dataset, _ = build_datasets(config(), train_samples=4, valid_samples=0)
    before = torch.get_rng_state()
    order(dataset)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_follows_the_seed_and_survives_the_cache(config, tmp_path):
    def tokens(**changes):
        dataset, _ = build_datasets(config(**changes), train_samples=30, valid_samples=0)
        return torch.cat(order(dataset)).tolist()

    first = tokens()
    assert tokens() == first
    assert tokens(data_cache_path=str(tmp_path / "another")) == first
    assert tokens(seed=2) != first


def test_data_written_anew_is_not_read_through_old_indices(config, make_data, hf_tokenizer):
    prefix = make_data("anew", corpus(30))
    changes = {"train_data_path": [prefix], "seq_length": 8}
    build_datasets(config(**changes), train_samples=5, valid_samples=0)
    source = Path(prefix).parent / "a.jsonl"
    source.write_text(json.dumps({"text": "its teacher " * 30}) + "\n")
    preprocess(
        PreprocessConfig(
            inputs=[str(source)], output=prefix, tokenizer=hf_tokenizer, overwrite=True
        )
    )
    dataset, _ = build_datasets(config(**changes), train_samples=5, valid_samples=0)
    kind = load_tokenizer(hf_tokenizer)
    assert set(torch.cat(order(dataset)).flatten().tolist()) <= set(
        [*kind.encode("its teacher its teacher "), kind.eod]
    )


def test_small_data_repeats_until_there_are_enough_samples(config, make_data):
    prefix = make_data("short", corpus(5))
    dataset, _ = build_datasets(
        config(train_data_path=[prefix], seq_length=16), train_samples=100, valid_samples=0
    )
    assert len(order(dataset, mbs=1)) >= 100


def test_weights_of_a_blend(one_process, config, make_data, hf_tokenizer):
    # Characters that the tokenizer never saw: one token each in both files.
    a = make_data("a", ["########"] * 40)
    b = make_data("b", ["@@@@@@@@"] * 80)
    (mark,) = load_tokenizer(hf_tokenizer).encode("#")

    def samples_from_a(*data_path):
        changed = config(train_data_path=list(data_path), seq_length=9)
        dataset, _ = build_datasets(changed, train_samples=200, valid_samples=0)
        return (torch.cat(order(dataset))[:200] == mark).any(dim=1).sum().item()

    assert abs(samples_from_a("0.25", a, "0.75", b) - 50) <= 1
    assert abs(samples_from_a("3", a, "1", b) - 150) <= 1
    assert abs(samples_from_a(a, b) - 67) <= 1  # in proportion to their tokens


def test_loss_mask_at_the_end_of_documents(config, hf_tokenizer):
    eod = load_tokenizer(hf_tokenizer).eod
    for asked in (False, True):
        dataset, _ = build_datasets(config(eod_mask_loss=asked), train_samples=9, valid_samples=0)
        for i in range(9):
            at_end = dataset[i]["tokens"] == eod
            assert at_end.any()
            expected = 1.0 - at_end.float() if asked else torch.ones(SEQ)
            assert torch.equal(dataset[i]["loss_mask"], expected)


def test_validation_data(config, make_data, prefix):
    held_out = make_data("held_out", corpus(60))
    both = config(valid_data_path=[held_out])
    train, valid = build_datasets(both, train_samples=10, valid_samples=6)
    alone, _ = build_datasets(config(), train_samples=10, valid_samples=0)
    assert torch.equal(torch.cat(order(train)), torch.cat(order(alone)))
    assert len(valid) >= 6
    assert torch.equal(torch.cat(order(valid)), torch.cat(order(valid)))
    assert list(data_identity(both)) == [prefix]


def _order_on_a_rank(config):
    dataset, _ = build_datasets(config, train_samples=12, valid_samples=0)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return torch.stack(order(dataset, rank=rank, size=size)).tolist()


def test_two_processes_share_the_indices(config):
    changed = config(train_data_path=["1", *config().train_data_path])
    both = processes.run(2, _order_on_a_rank, changed)
    dataset, _ = build_datasets(changed, train_samples=12, valid_samples=0)
    assert both == [torch.stack(order(dataset, rank=r, size=2)).tolist() for r in range(2)]


def test_bad_data(config, make_data, prefix, sentencepiece_model, tmp_path):
    def refused(message, train_samples=4, **changes):
        with pytest.raises(UserError, match=message) as caught:
            build_datasets(config(**changes), train_samples=train_samples, valid_samples=2)
        assert "\n" not in str(caught.value)

    nowhere = str(tmp_path / "nowhere")
    other = make_data("other", corpus(50), tokenizer=sentencepiece_model)
    vocab_size = config().vocab_size
    refused("nowhere.bin is missing", train_data_path=[nowhere])
    refused("--valid-data-path .*nowhere.bin is missing", valid_data_path=[nowhere])
    refused(f"{prefix}.*vocabulary.*{vocab_size}.* {vocab_size - 1}", vocab_size=vocab_size - 1)
    refused(f"{prefix}.*vocabulary.*{vocab_size}.* 151936", vocab_size=151936)
    refused("too few for one sample of --seq-length 100000", seq_length=100000)
    refused("another tokenizer than that of", train_data_path=[prefix, other, prefix])
    refused("another tokenizer than --train-data-path's", valid_data_path=[other])
    refused("expected weights above 0", train_data_path=["0", prefix, "1", prefix])
    build_datasets(config(vocab_size=vocab_size + 20), train_samples=1, valid_samples=0)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".bin", b"12345", "has 5 bytes, not those of"),
        (".json", b"{", "is not JSON"),
        (".json", b"{}", "has no vocab_size"),
        (".json", b"[]", "has no vocab_size"),
    ],
)
def test_damaged_data(config, make_data, suffix, content, message):
    prefix = make_data("damaged", corpus(20))
    Path(prefix + suffix).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_datasets(config(train_data_path=[prefix]), train_samples=1, valid_samples=0)


def with_byte(content, place, value):
    return content[:place] + bytes([value]) + content[place + 1 :]


BAD_INDICES = {
    "empty": lambda content: b"",
    "header cut off": lambda content: content[:20],
    "another file": lambda content: b"PK" + content,
    "another version": lambda content: with_byte(content, 9, 2),
    "no such type": lambda content: with_byte(content, 17, 99),
    "cut off": lambda content: content[:100],
    "countless sequences": lambda content: with_byte(content, 25, 255),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_a_damaged_index_says_one_thing(config, make_data, monkeypatch, case):
    """Nothing half constructed is left, whose end Python would complain about."""
    prefix = make_data("damaged", corpus(20))
    file = Path(prefix + ".idx")
    file.write_bytes(BAD_INDICES[case](file.read_bytes()))
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    changed = config(train_data_path=[prefix])
    with pytest.raises(UserError, match=r"--train-data-path .*\.idx is damaged: \S"):
        build_datasets(changed, train_samples=1, valid_samples=0)
    gc.collect()
    assert ignored == []


def test_data_of_no_tokens(config, make_data):
    prefix = make_data("none", corpus(20))
    Path(prefix + ".bin").write_bytes(b"")
    file = Path(prefix + ".json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokens": 0}))
    with pytest.raises(UserError, match="none.bin has no tokens"):
        build_datasets(config(train_data_path=[prefix]), train_samples=1, valid_samples=0)


def test_data_without_a_document_token(config, make_data, prefix):
    bare = make_data("bare", corpus(50), append_eod=False)
    file = Path(bare + ".json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "eod": None}))
    dataset, _ = build_datasets(config(train_data_path=[bare]), train_samples=2, valid_samples=0)
    assert dataset[0]["loss_mask"].eq(1).all()
    with pytest.raises(UserError, match="--eod-mask-loss"):
        changed = config(train_data_path=[bare], eod_mask_loss=True)
        build_datasets(changed, train_samples=2, valid_samples=0)


def test_what_is_given_instead_of_a_prefix(config, prefix, tmp_path):
    """The same line for training, validation and calibration data."""

    def refused(given, message):
        for flag, build in {
            "--train-data-path": lambda: check_train_data(config(train_data_path=[given])),
            "--valid-data-path": lambda: build_datasets(
                config(valid_data_path=[given]), train_samples=1, valid_samples=1
            ),
            "--calibration-data-path": lambda: calibration_data(
                [given], save=str(tmp_path), seq_length=SEQ, seed=1, vocab_size=300
            ),
        }.items():
            with pytest.raises(UserError) as caught:
                build()
            assert str(caught.value).startswith(f"{flag} {given}: {message}"), caught.value
            assert "\n" not in str(caught.value)

    for suffix in (".bin", ".idx", ".json"):
        refused(prefix + suffix, f"expected the prefix {prefix}, without {suffix}")
    folder = str(Path(prefix).parent)
    refused(folder, f"is a folder; expected a prefix, such as {prefix}")
    (tmp_path / "none").mkdir()
    refused(str(tmp_path / "none"), "is a folder; expected a prefix")

    theirs = str(tmp_path / "theirs_text_document")
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, theirs + suffix)
    described = json.loads(Path(prefix + ".json").read_text())
    missing = f"{theirs}.json is missing. For tokens of Megatron-LM's preprocess_data.py write it: "
    refused(theirs, missing)
    with pytest.raises(UserError) as caught:
        check_train_data(config(train_data_path=[theirs]))
    # Who does what the message says is done.
    text = str(caught.value).removeprefix(f"--train-data-path {theirs}: {missing}")
    text = text[: text.index("}") + 1].replace('"vocab_size": V', '"vocab_size": 300')
    Path(theirs + ".json").write_text(text.replace('"eod": E', '"eod": 0'))
    written = json.loads(Path(theirs + ".json").read_text())
    assert written["tokens"] == described["tokens"]
    check_train_data(config(train_data_path=[theirs], vocab_size=300))
    for eod in (-1, 300, 10**9):
        Path(theirs + ".json").write_text(json.dumps({**written, "eod": eod}))
        refused(theirs, f"{theirs}.json: eod {eod} is none of 300 tokens")
    Path(theirs + ".json").write_text("[" * 100_000)
    refused(theirs, f"{theirs}.json is not JSON")
    Path(theirs + ".idx").write_bytes(b"garbage")
    Path(theirs + ".json").unlink()
    refused(theirs, missing)
