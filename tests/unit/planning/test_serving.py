"""What a plan says about serving, against what vLLM 0.26 logged on an H200, and by hand.

Measured: random weights of Qwen3-8B's shapes and its students', bfloat16, 139.8 GB (2^30 bytes) of
which 0.9 are used, requests of 36,864 tokens. The reserve of 2 GB is one number for all models, so
what is left for the cache is within 2 %; ratios to the teacher come from the layout alone.
"""

import json
import sys
from pathlib import Path

import pytest

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.planning.serving import (
    ServingSize,
    engine_flags,
    serve_student,
    serve_teacher,
    serving_notes,
)
from megatron_attnedit.planning.training_hours import RATES, SOURCE, gpu_hours
from tests.support.models import tiny_hf_dir
from tools import plan as tool

RECIPES = Path("examples/recipes")
DENSE, MOE = (read_hf_config(RECIPES / name) for name in ("qwen3_8b", "qwen3_30b_a3b"))
CONTEXT = 36864
H200 = 139.8
EVERY_FIFTH = "4,9,14,19,24,29,34"


def of(hf, student, context=CONTEXT, gpu_memory=H200, **fields):
    size = ServingSize(gpu_memory=gpu_memory, **fields)
    if student is None:
        return serve_teacher(hf, size, context)
    return serve_student(hf, student, size, context)


@pytest.mark.parametrize(
    ("flags", "batched", "requests"),
    [
        (None, 8192, 21.5),
        ({}, 2048, 82.1),
        ({}, 8192, 39.7),
        ({}, 16384, 23.4),  # vLLM's default there
        ({"full_layers": EVERY_FIFTH}, 2048, 70.4),
    ],
)
def test_requests_as_vllm_logged_them(flags, batched, requests):
    student = None if flags is None else GateSWA.from_flags(flags, DENSE)
    found = of(DENSE, student, max_num_batched_tokens=batched)
    assert found.requests == pytest.approx(requests, rel=0.02)


def test_tokens_of_mla_as_vllm_logged_them():
    teacher, student = of(DENSE, None), of(DENSE, MLA.from_flags({}, DENSE))
    assert teacher.tokens == pytest.approx(791_312, rel=0.02)
    assert student.tokens == pytest.approx(2_793_232, rel=0.02)
    assert student.tokens / teacher.tokens == pytest.approx(3.53, rel=0.01)


def test_blocks_by_hand():
    """36 layers as six groups of six: a full one and five that slide, blocks of 16 tokens."""
    found = of(DENSE, GateSWA.from_flags({}, DENSE))
    page = 6 * 16 * 2 * 8 * 128 * 2
    read = -(-(127 + 2 * 2048) // 16) + 1
    assert found.request_bytes == page * (CONTEXT // 16 + 5 * read)
    # Of the window's 128 tokens, which end with a block, 127 are before the next token.
    assert found.held_bytes == page * (CONTEXT // 16 + 5 * 8)
    assert found.padded_layers == 0
    padded = of(DENSE, GateSWA.from_flags({"full_layers": EVERY_FIFTH}, DENSE))
    assert padded.padded_layers == 6 * 7 - 36


def test_blocks_that_vllm_cpu_held():
    """The embedded teacher's student, 1518 tokens in blocks of 128: 30.6 % were counted there."""
    hf = read_hf_config("examples/embedded_teacher/model")
    student = GateSWA.from_flags({"full_layers": "3"}, hf)
    teacher, found = (of(hf, each, 1518, 1000, block_size=128) for each in (None, student))
    assert found.held_bytes / teacher.held_bytes == pytest.approx(0.306, abs=0.001)


def test_tensor_parallel():
    """A latent is on every GPU: with four of them MLA loses to four key-value heads."""
    mla, swa = MLA.from_flags({}, MOE), GateSWA.from_flags({}, MOE)
    for gpus, ratio in ((1, 320 / 1024), (2, 320 / 512), (4, 320 / 256), (8, 320 / 256)):
        size = {"serving_tensor_parallel_size": gpus}
        teacher, student = of(MOE, None, **size), of(MOE, mla, **size)
        assert student.held_bytes / teacher.held_bytes == pytest.approx(ratio)
        notes = serving_notes(teacher, student, ServingSize(**size))
        assert bool(notes) == (ratio > 1)
        if notes:
            assert notes[0].startswith(f"at --serving-tensor-parallel-size {gpus} the student cach")
            assert "1.25 x" in notes[0]
        assert of(MOE, swa, **size).held_bytes < teacher.held_bytes / 4
    # Weights are cut, norms and the router are not.
    whole, cut = (of(MOE, None, serving_tensor_parallel_size=n).weight_bytes for n in (1, 4))
    assert whole / 4 < cut < 1.01 * whole / 4


def test_notes_on_what_costs_requests():
    teacher = of(DENSE, None)
    student = GateSWA.from_flags({"full_layers": EVERY_FIFTH}, DENSE)
    size = ServingSize(gpu_memory=H200, max_num_batched_tokens=16384)
    found = serve_student(DENSE, student, size, CONTEXT)
    few, padding = serving_notes(teacher, found, size)
    assert "smaller --max-num-batched-tokens" in few and padding.startswith("6 layers of padding")


def test_flags_of_the_engine():
    size = ServingSize(serving_tensor_parallel_size=2)
    assert engine_flags(DENSE, MLA.from_flags({}, DENSE), size, 4096) == (
        "--max-model-len 4096 --tensor-parallel-size 2"
    )
    assert engine_flags(DENSE, GateSWA.from_flags({}, DENSE), ServingSize(), 4096) == (
        "--max-model-len 4096 --max-num-batched-tokens 2048"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpu_memory": 16}, "--gpu-memory 16: 16.9 GB of weights"),
        ({"serving_tensor_parallel_size": 3}, "--serving-tensor-parallel-size 3: cannot share 32"),
        ({"serving_tensor_parallel_size": 0}, "--serving-tensor-parallel-size 0: must be at"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens 0: must be at least 1"),
        ({"gpu_memory": -1}, "--gpu-memory -1: expected GB"),
        ({"gpu_memory": float("nan")}, "--gpu-memory nan: expected GB"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        of(DENSE, MLA.from_flags({}, DENSE), **fields)


def test_rates_are_those_of_the_committed_measurements():
    rows = json.loads(Path(SOURCE).read_text())
    for (stage, experts), rate in RATES.items():
        (row,) = (r for r in rows if (r["suite"], r["case"]) == (f"stage{stage}", rate.case))
        assert row["ours"]["tokens_per_s"] == rate.tokens_per_second
        # At the measured shapes the scaled rate is the measured one.
        layers = 16 if experts else 36
        hf = MOE if experts else DENSE
        hf = type(hf)(**{**vars(hf), "num_hidden_layers": layers})
        hours = gpu_hours(hf, stage, rate.tokens_per_second * 3600, 4096)
        assert hours.gpu_hours == pytest.approx(1, rel=1e-3)


def test_hours_scale_with_the_arithmetic():
    half = type(DENSE)(**{**vars(DENSE), "num_hidden_layers": 18})
    whole, fewer = (gpu_hours(hf, 1, 10**9, 4096).gpu_hours for hf in (DENSE, half))
    assert fewer == pytest.approx(whole / 2)  # stage 1 has no head


def test_the_tool(monkeypatch, capsys, tmp_path):
    flags = ["--teacher", RECIPES / "qwen3_30b_a3b", "--student-attention", "mla"]
    flags += ["--context", CONTEXT, "--gpu-memory", 80, "--serving-tensor-parallel-size", 4]
    flags += ["--stage1-tokens", 262144000, "--stage2-tokens", 838860800]
    flags += ["--json", tmp_path / "plan.json"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    tool.main()
    shown, found = capsys.readouterr(), json.loads((tmp_path / "plan.json").read_text())
    assert shown.err == ""
    assert "note: at --serving-tensor-parallel-size 4" in shown.out and "1.25 x" in shown.out
    assert "262,144,000 tokens in " in shown.out and SOURCE in shown.out
    teacher, student = (found["serving"][name] for name in ("teacher", "student"))
    assert student["requests"] < teacher["requests"]
    assert found["serving"]["flags"] == "--max-model-len 36864 --tensor-parallel-size 4"
    assert found["stage2_hours"]["gpu_hours"] > found["stage1_hours"]["gpu_hours"] > 1


def test_the_tool_warns_of_a_student_that_is_not_served(monkeypatch, capsys, tmp_path):
    flags = ["--teacher", str(tiny_hf_dir(tmp_path / "hf")), "--student-attention", "mla"]
    monkeypatch.setattr(
        sys, "argv", ["plan.py", *flags, "--kv-lora-rank", "16", "--seq-length", "64"]
    )
    tool.main()
    shown = capsys.readouterr().err.splitlines()
    (line,) = (line for line in shown if line.startswith("warning: "))
    assert "no engine has a kernel for" in line
