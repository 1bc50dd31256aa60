"""Packed documents with masks against one document at a time: losses and gradients of both stages.

The same documents, each in a micro-batch of its own, in one process; packed on every layout.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoModelForCausalLM

from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.core_attention.windows import causal_window_mask, positions_in_documents
from megatron_attnedit.data.datasets import Batch
from megatron_attnedit.models.parallel_layout import place_of_this_process
from megatron_attnedit.models.teacher import backbone, vocab_parallel_logits
from megatron_attnedit.training import run as training_run
from megatron_attnedit.training.run import prepare
from tests.support import processes
from tests.support.grids import (
    GRIDS,
    LAYERS,
    STAGES,
    gather_gradients,
    largest_difference,
    rows_of,
    trained,
)
from tests.support.inputs import make_inputs, make_student
from tests.support.inputs import recipe as small_recipe
from tests.support.models import VOCAB, build_tiny_teacher, start_megatron, tiny_data, tokens

BAR = 1e-5
EOD = VOCAB - 1
# Documents of one token, shorter than a window, longer than a sample.
LENGTHS = [1, 9, 30, 5, 47, 2, 21, 8, 90, 17]
LONGEST = max(LENGTHS)
STUDENTS = {
    "mla": {},
    "mla_chosen": {"mla_rotary": "chosen"},
    "gate_swa": {"sliding_window": 8, "full_layers": "1"},
    "sink_tokens": {"sliding_window": 8, "sink_tokens": 3, "full_layers": "1"},
    "sink_logits": {"sliding_window": 8, "sink": "logit", "full_layers": "1"},
}
BOTH = {"reset_attention_mask": True, "reset_position_ids": True}


def packed_data(prefix: Path, source: Path) -> None:
    """The first tokens of each document of ``source``, which are of one length."""
    ids = numpy.fromfile(f"{source}.bin", numpy.uint16).reshape(-1, LONGEST)
    ids[ids == EOD] = 0
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    total = 0
    for length, document in zip(itertools.cycle(LENGTHS), ids, strict=False):
        document[length - 1] = EOD
        builder.add_document(torch.from_numpy(document[:length].astype(numpy.int32)), [length])
        total += length
    builder.finalize(f"{prefix}.idx")
    description = json.loads(Path(f"{source}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**description, "tokens": total}))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("documents"), num_hidden_layers=LAYERS)
    tiny_data(folder / "long", folder / "hf", length=LONGEST)
    packed_data(folder / "packed", folder / "long")
    for name, flags in STUDENTS.items():
        if not (folder / name).exists():
            chosen = "mla_rotary" in flags
            kind, calibration = ("mla", folder / "data") if chosen else ("gate_swa", None)
            make_student(folder, name, kind, flags, calibration=calibration)
    return folder


def with_loss_mask(batch: Batch) -> Batch:
    """As data that says which tokens count: two in three, here and there."""
    return dataclasses.replace(batch, loss_mask=batch.loss_mask * (batch.tokens % 3 > 0))


def apart(batch: Batch) -> list[Batch]:
    """Each document by itself, as if it had never been packed."""
    found = []
    for row, ids in enumerate(batch.documents.document_ids):
        for number in ids.unique():
            (place,) = (ids == number).nonzero(as_tuple=True)
            part = batch.each(lambda t, row=row, place=place: t[row : row + 1, place])
            positions = torch.arange(len(place)).unsqueeze(0)
            ours = [batch.sample_ids[row]]
            found.append(
                dataclasses.replace(part, position_ids=positions, documents=None, sample_ids=ours)
            )
    return found


def leaking(batch: Batch) -> Batch:
    """A sample's second document sees its first one."""
    ids = batch.documents.document_ids
    ids = ids - (ids > 0).int()
    documents = Documents.of_samples(list(ids), [None] * len(ids))
    positions = batch.documents.position_ids
    return dataclasses.replace(
        batch, documents=dataclasses.replace(documents, position_ids=positions)
    )


def whole(batch: Batch) -> Batch:
    return dataclasses.replace(batch, documents=None)


MADE = {
    "packed": lambda batches: batches,
    "apart": lambda batches: [part for batch in batches for part in apart(batch)],
    "leaking": lambda batches: [*map(leaking, batches)],
    "whole": lambda batches: [*map(whole, batches)],
}


def gradients(stage, folder, student, save, ways, flags):
    """By the way that samples are made: place, losses, norms and gradients of one iteration."""
    cls, fields = STAGES[stage]
    values = {"train_data_path": [str(folder / "packed")], "eod_mask_loss": True, **BOTH}
    recipe = small_recipe(cls, folder, student, save, **{**values, **fields, **flags})
    run = prepare(recipe)
    count = recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    batches = run.batches(run.train_data, 0)
    batches = [with_loss_mask(next(batches)) for _ in range(count)]
    answers = {}
    for way in ways:
        made = MADE[way](batches)
        run.optimizer.zero_grad()
        metrics = run.stage.train_step(iter(made), len(made))
        gather_gradients(run)
        grads = {name: p.main_grad.float().clone().cpu() for name, p in trained(run)}
        answers[way] = place_of_this_process(), [metrics["loss"]], [], grads
    return answers


def differences(folder, student, answers, expected):
    rows = rows_of(folder, student)
    loss = max(abs(answer[1][0] / expected[1][0] - 1) for answer in answers)
    return {"loss": loss, "gradients": largest_difference(rows, answers, expected, 3)}


CELLS = [
    ("stage 1", "mla", {}),
    ("stage 1", "sink_tokens", {}),
    ("stage 1", "sink_logits", {"attention_backend": "reference"}),
    ("stage 2 all, recompute", "gate_swa", {"reset_position_ids": False}),
    ("stage 2", "mla", {"attention_backend": "reference"}),
]
MORE = [
    (stage, student, {"attention_backend": backend, "reset_position_ids": positions})
    for stage in (*STAGES,)
    for student in STUDENTS
    for backend in ("sdpa", "reference")
    for positions in (False, True)
]


@pytest.mark.parametrize(
    "stage, student, flags",
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.full) for cell in MORE)],
)
def test_packed_is_one_at_a_time(inputs, tmp_path, stage, student, flags):
    ways = ["apart", "packed", "leaking", "whole"]
    (found,) = processes.run(1, gradients, stage, inputs, student, tmp_path / "run", ways, flags)
    packed, leak, without = (
        differences(inputs, student, [found[way]], found["apart"]) for way in ways[1:]
    )
    assert max(packed.values()) <= BAR, packed
    assert leak["gradients"] > 100 * BAR, leak
    assert without["gradients"] > 100 * BAR, without


ON_GRIDS = [
    ("stage 2", "gate_swa", "CP2"),
    ("stage 2", "mla", "TP2 SP"),
    ("stage 1", "mla_chosen", "CP2"),
    ("stage 2", "sink_logits", "PP2"),
]
REST = [
    (stage, student, grid)
    for stage in ("stage 1", "stage 2", "stage 1 on own inputs")
    for student in STUDENTS
    for grid in ("TP2", "TP2 SP", "PP2", "PP2 interleaved", "CP2", "TP2 SP x CP2", "DP2 overlap")
]


@pytest.mark.parametrize(
    "stage, student, grid",
    [*ON_GRIDS, *(pytest.param(*cell, marks=pytest.mark.full) for cell in REST)],
)
def test_packed_on_a_grid(inputs, tmp_path, stage, student, grid):
    """Boundaries reach every process: of a pipeline, of a layer, of a sequence."""
    compare_on_a_grid(inputs, tmp_path, stage, student, grid, {})


@pytest.mark.full
@pytest.mark.parametrize("grid", ["TP2 SP", "PP2", "CP2"])
@pytest.mark.parametrize(
    "stage, student", [("stage 1", "sink_logits"), ("stage 2", "mla"), ("stage 2", "sink_tokens")]
)
def test_packed_on_a_grid_by_the_reference(inputs, tmp_path, stage, student, grid):
    compare_on_a_grid(inputs, tmp_path, stage, student, grid, {"attention_backend": "reference"})


def compare_on_a_grid(inputs, tmp_path, stage, student, grid, flags):
    """Packed is one at a time, and a leak that is planted in every process is seen."""
    arguments = gradients, stage, inputs, student
    (expected,) = processes.run(1, *arguments, tmp_path / "one", ["apart"], flags)
    world_size, of_grid, _ = GRIDS[grid]
    ways, flags = ["packed", "leaking"], {**of_grid, **flags}
    answers = processes.run(world_size, *arguments, tmp_path / "many", ways, flags)
    packed, leak = (
        differences(inputs, student, [answer[way] for answer in answers], expected["apart"])
        for way in ways
    )
    assert max(packed.values()) <= BAR, packed
    assert leak["gradients"] > 100 * BAR, leak


def teacher_logits(hf_dir, ids, documents):
    start_megatron()
    hf, teacher = build_tiny_teacher(hf_dir)
    with torch.no_grad():
        hidden = backbone(teacher, ids, documents.position_ids, documents)
        return vocab_parallel_logits(teacher, hidden)[..., : hf.vocab_size].transpose(0, 1)


@pytest.mark.parametrize("masks, positions", [(True, False), (False, True), (True, True)])
def test_the_teacher_is_transformers(inputs, masks, positions):
    """Told which keys each query sees, and which position each token has."""
    ids = tokens(length=63)
    lengths = torch.tensor([[1, 20, 42], [30, 32, 1]])
    numbers = torch.stack([torch.arange(3).repeat_interleave(row).int() for row in lengths])
    inside = positions_in_documents(numbers)
    documents = Documents.of_samples(
        list(numbers) if masks else [None], list(inside) if positions else [None]
    )
    seen = causal_window_mask(63, 63, None, ids.device, document_ids=numbers if masks else None)
    model = AutoModelForCausalLM.from_pretrained(inputs / "hf", attn_implementation="eager")
    with torch.no_grad():
        expected = model(
            ids,
            attention_mask=torch.zeros(2, 1, 63, 63).masked_fill(~seen.view(-1, 1, 63, 63), -1e9),
            position_ids=inside if positions else torch.arange(63).expand_as(ids),
        ).logits
    (found,) = processes.run(1, teacher_logits, inputs / "hf", ids, documents)
    assert (found - expected).abs().max() <= 1e-4
    without = model(ids).logits
    assert (found - without).abs().max() > 1e-2


@pytest.mark.parametrize("stage, student", [("stage 1", "sink_logits"), ("stage 2", "mla")])
def test_bf16(inputs, tmp_path, stage, student):
    """Rounding to 8 bits of mantissa, in other sums."""
    arguments = stage, inputs, student, tmp_path / "run", ["apart", "packed", "leaking"]
    (found,) = processes.run(1, gradients, *arguments, {"bf16": True})
    packed, leak = (
        differences(inputs, student, [found[way]], found["apart"]) for way in ("packed", "leaking")
    )
    assert packed["loss"] <= 5e-3 and packed["gradients"] <= 5e-2, packed
    assert leak["gradients"] > 0.2, leak


def gradients_of_a_poor_teacher(*arguments):
    """One that guesses as well on a sample of short documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "check_teacher", lambda *unused: None)
        return gradients(*arguments)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
@pytest.mark.parametrize("grid", ["EP2", "EP2 x TP2 SP"])
def test_experts(tmp_path_factory, stage, grid):
    """Which look at the batch's shape, not at its documents."""
    folder = make_inputs(tmp_path_factory.mktemp("experts"), "qwen3_moe", num_hidden_layers=2)
    tiny_data(folder / "long", folder / "hf", length=LONGEST)
    packed_data(folder / "packed", folder / "long")
    arguments = gradients_of_a_poor_teacher, stage, folder, "mla"
    (expected,) = processes.run(1, *arguments, folder / "one", ["apart"], {})
    world_size, flags, _ = GRIDS[grid]
    answers = processes.run(world_size, *arguments, folder / "many", ["packed"], flags)
    found = differences(folder, "mla", [a["packed"] for a in answers], expected["apart"])
    assert max(found.values()) <= BAR, found
