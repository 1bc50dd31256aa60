"""Where the documents of a packed sample begin, and what is refused for it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_attnedit.data.datasets import batches, build_datasets, check_train_data
from megatron_attnedit.data.tokenizer import load_tokenizer
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import Lineage
from tests.support.loss_masks import add_mask
from tests.support.tokenizers import corpus
from tests.unit.data.conftest import SEQ


def first_batch(config, workers=0, **asked):
    dataset, _ = build_datasets(config(**asked), train_samples=9, valid_samples=0)
    found = batches(
        dataset,
        micro_batch_size=9,
        data_parallel_rank=0,
        data_parallel_size=1,
        consumed_samples=0,
        num_workers=workers,
    )
    return next(found)


@pytest.mark.parametrize(
    "masks, positions, workers", [(True, False, 0), (False, True, 0), (True, True, 1)]
)
def test_a_document_ends_with_its_token(config, hf_tokenizer, masks, positions, workers):
    batch = first_batch(config, workers, reset_attention_mask=masks, reset_position_ids=positions)
    eod = load_tokenizer(hf_tokenizer).eod
    documents, begins = batch.documents, []
    assert (documents.document_ids is not None) == masks
    assert (documents.position_ids is not None) == positions
    for row, tokens in enumerate(batch.tokens.tolist()):
        number = position = 0
        for i, token in enumerate(tokens):
            begins += [row * SEQ + i] * (position == 0)
            if masks:
                assert documents.document_ids[row, i] == number
            assert batch.position_ids[row, i] == (position if positions else i)
            number, position = (number + 1, 0) if token == eod else (number, position + 1)
    assert len(begins) > 2 * 9
    if masks:
        ends = [*begins, *[9 * SEQ] * (len(documents.cu_seqlens) - len(begins))]
        assert documents.cu_seqlens.tolist() == ends
    if positions:
        assert torch.equal(documents.position_ids, batch.position_ids)


def test_nothing_asked(config):
    assert first_batch(config).documents is None


def test_beside_a_mask_of_the_loss(config, make_data):
    plain = make_data("data", corpus(50))
    asked = {"reset_attention_mask": True, "reset_position_ids": True}
    without = first_batch(config, train_data_path=[plain], **asked)
    masked = first_batch(config, train_data_path=[add_mask(Path(plain).parent)], **asked)
    for name in ("document_ids", "position_ids"):
        of_both = [getattr(batch.documents, name) for batch in (without, masked)]
        assert torch.equal(*of_both)
    assert torch.equal(without.tokens, masked.tokens)
    assert without.loss_mask.all() and 0 < masked.loss_mask.mean() < 1


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids"])
def test_data_whose_documents_do_not_end(config, make_data, flag):
    bare = make_data(f"bare_{flag}", corpus(50), append_eod=False)
    changed = config(train_data_path=[bare], **{flag: True})
    name = f"--{flag.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{name}: .* written without --append-eod"):
        check_train_data(changed)
    file = Path(bare + ".json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "eod": None}))
    with pytest.raises(UserError, match=f"{name}: .*json names no end-of-document token"):
        check_train_data(changed)


def test_a_run_goes_on_with_the_same_masks():
    recipe = {"global_batch_size": 8, "seq_length": 64, "seed": 1}
    before = Lineage(
        stage="stage1", teacher="t", teacher_fingerprint="f", recipe={**recipe, "lr": 1}
    )
    for name in ("reset_attention_mask", "reset_position_ids"):
        same = dataclasses.replace(before, recipe={**recipe, name: False})
        same.refuse_other(before, "here")  # written before there were masks
        other = dataclasses.replace(before, recipe={**recipe, name: True})
        message = (
            f"here: holds a run with another {name.replace('_', ' ')} \\(False, this run has T"
        )
        with pytest.raises(UserError, match=message):
            other.refuse_other(before, "here")
