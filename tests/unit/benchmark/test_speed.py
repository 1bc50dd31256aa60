"""The benchmark: floors against counting by hand, rows, and the page made of the figures."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.registry import student_attention_class
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.core_attention.windows import mean_visible_keys as visible_keys
from megatron_attnedit.device.communication import covered, shares
from megatron_attnedit.models.parallel_layout import ParallelConfig
from tests.support import processes
from tools.benchmark import speed_page, timing
from tools.benchmark.decode import decode_suite
from tools.benchmark.floor import stage_floor
from tools.benchmark.scaling import beside_one_process, grid_name, scaling_row
from tools.benchmark.workload import Workload

ROOT = Path(__file__).parents[3]
QWEN3_8B = ROOT / "examples" / "recipes" / "qwen3_8b"


@pytest.mark.parametrize("window", [None, 1, 3, 10, 12])
def test_visible_keys(window):
    length = 10
    seen = [min(i + 1, window or length) for i in range(length)]
    assert visible_keys(length, window) == pytest.approx(sum(seen) / length)


def test_floor_of_stage_1_at_qwen3_8b():
    """781 million operations per token and layer, as counted by hand for sequences of 4096, less
    the last layer's MLP.
    """
    hf = read_hf_config(QWEN3_8B)
    found = stage_floor(hf, MLA.from_flags({}, hf), seq_length=4096, stage=1)
    mlp = 6 * 4096 * 12288
    teacher = 2 * 4096 * (6144 + 4096) + 4 * 4096 * 2048.5 + mlp
    matrices = 4096 * 6144 + 4096 * 576 + 512 * 8192 + 4096 * 4096
    on_input = 4096 * 6144 + 4096 * 576
    by_hand = teacher + 2 * (3 * matrices - on_input) + 3 * 2 * 32 * 320 * 2048.5
    assert found == pytest.approx(36 * by_hand - mlp)
    assert by_hand == pytest.approx(781e6, rel=0.01)


def test_floor_of_stage_2_counts_heads_and_kept_layers():
    hf = read_hf_config(QWEN3_8B)
    student = GateSWA.from_flags({"sliding_window": 128, "full_layers": "34,35"}, hf)
    less = stage_floor(hf, student, seq_length=4096, stage=1)
    more = stage_floor(hf, student, seq_length=4096, stage=2)
    projections = 2 * 4096 * (6144 + 4096)
    attention = projections + 4 * 4096 * 2048.5
    mlp = 6 * 4096 * 12288
    extra = 36 * 2 * mlp + 2 * (3 * attention - projections) + 6 * 4096 * 151936
    extra += 34 * 2 * 4096 * (6144 + 4096)
    extra += 2 * attention + 3 * mlp  # behind the last edited attention
    assert more - less == pytest.approx(extra)
    everything = stage_floor(hf, student, seq_length=4096, stage=2, trainable="all")
    weights = 36 * mlp + 2 * projections + 2 * 4096 * 151936
    assert everything - more == pytest.approx(weights)
    own = stage_floor(hf, student, seq_length=4096, stage=1, runs_student=True)
    assert own - less == pytest.approx(36 * mlp + 2 * attention)


def test_rows():
    figures = timing.Figures(ms=20.0, peak_gb=2.0, beyond_gb=1.0)
    ours = timing.side(figures, tokens=100, flops=5e9, rate=1e12)
    assert ours["tokens_per_s"] == 5000
    assert ours["utilisation"] == 0.25
    row = timing.row("kl", "a case", ours, {"ms": 30.0})
    assert (row["ratio"], row["floor_fraction"]) == (1.5, 0.25)
    assert "ratio" not in timing.row("kl", "a case", ours, {"error": "out of memory"})
    assert "ratio" not in timing.row("kl", "a case", {"error": "out of memory"}, ours)


def test_a_row_takes_the_place_of_the_old_one(tmp_path):
    file = tmp_path / "figures.json"
    for ms in (2.0, 1.0):
        row = {"suite": "kl", "case": "a", "ours": {"ms": ms}, "baseline": None}
        speed_page.add_rows(file, [row])
    speed_page.add_rows(file, [{"suite": "kl", "case": "b", "ours": {"ms": 3}, "baseline": None}])
    assert [row["ours"]["ms"] for row in json.loads(file.read_text())] == [1.0, 3]


def test_tables_of_decoding_show_the_cache():
    sides = {"ms": 20.0, "tokens_per_s": 50, "kv_gb": 1.234, "peak_gb": 20.0, "utilisation": 0.2}
    row = timing.row("decode", "a case", sides, {"error": "out of memory"})
    text = speed_page.tables([{**row, "device": "a card", "date": "today", "versions": {}}])
    assert "| ours GB of cache | ours GB in all | ours of memory's rate |" in text
    assert "| a case | 20.0 | 50 | 1.23 | 20.0 | 20.0% | out of memory |  |  |  |  |  |" in text


def test_the_page_has_the_committed_figures(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "reference" / "speed.md").read_text())
    speed_page.write_page(ROOT / "docs" / "data" / "performance.json", page)
    assert page.read_text() == (ROOT / "docs" / "reference" / "speed.md").read_text()


def test_communication_is_exposed_where_nothing_else_runs():
    talking, computing = [(1.0, 3.0), (2.0, 5.0)], [(0.0, 2.0), (4.0, 4.5), (9.0, 10.0)]
    assert covered(talking) == 4.0
    share = shares(talking, talking + computing)
    assert (share.busy, share.exposed) == pytest.approx((0.4, 0.25))  # 2 to 4 and 4.5 to 5, of 10


@pytest.fixture
def tiny_config(tmp_path):
    config = {
        **json.loads((QWEN3_8B / "config.json").read_text()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


def on_grid(*flags):
    """What the tool does with these flags in processes that are there already."""
    from tools.benchmark import __main__ as benchmark

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark.py", "--suite", "scaling", *flags])
        args = benchmark.parse_args()
    work = benchmark.workload(args, benchmark.read_config(args))
    return scaling_row(work, dist.get_world_size())


def test_a_grid_is_measured_beside_one_process(tmp_path, tiny_config):
    task = ["--config", str(tiny_config), "--stage", "2", "--seq-length", "32"]
    task += ["--micro-batches", "2"]
    (alone,) = processes.run(1, on_grid, *task)
    grid = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    both = processes.run(2, on_grid, *task, *grid)
    assert both[0] == both[1]
    assert (alone["grid"], both[0]["grid"]) == ("one process", "TP2 SP")
    assert alone["ours"]["communication_busy"] < both[0]["ours"]["communication_busy"] < 1
    file, page = tmp_path / "figures.json", tmp_path / "page.md"
    speed_page.add_rows(file, [alone])
    row = beside_one_process(both[0], json.loads(file.read_text()))
    rates = [side["tokens_per_s"] for side in (row["ours"], row["baseline"])]
    assert row["ratio"] == pytest.approx(rates[0] / rates[1], abs=1e-3)
    # A pair computes twice the samples of one process in a step.
    assert rates[0] == pytest.approx(64 / row["ours"]["ms"] * 1e3, rel=0.01)
    speed_page.add_rows(file, [row])
    page.write_text(f"{speed_page.BEGIN}{speed_page.END}")
    speed_page.write_page(file, page)
    assert f"| TP2 SP | 2 | {row['ours']['ms']:,.1f} |" in page.read_text()


def test_grids_have_names():
    hf = read_hf_config(QWEN3_8B)
    work = Workload(hf=hf, student=MLA.from_flags({}, hf), stage=1)
    assert grid_name(work, 4) == "DP4"
    grid = ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2
    )
    full = dataclasses.replace(
        work, parallel=grid, overlap_grad_reduce=True, overlap_param_gather=True
    )
    assert grid_name(full, 8) == "TP2 SP x PP2 x DP2, overlap"


def test_both_sides_run_and_are_compared(tmp_path, tiny_config):
    """On a CPU and a tiny model the figures mean nothing; both sides have to be there."""
    command = [
        sys.executable,
        "-m",
        "tools.benchmark",
        "--suite",
        "stage1",
        "--seq-length",
        "32",
        "--config",
        tiny_config,
        "--json",
        tmp_path / "out.json",
    ]
    subprocess.run(command, check=True, cwd=ROOT, timeout=240)
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["ratio"] == pytest.approx(row["baseline"]["ms"] / row["ours"]["ms"], rel=1e-2)
    assert row["case"].startswith("qwen3 hidden 64, 2 layers, MLA 32+16, sequence 32")


TINY_STUDENTS = {
    "mla": ({"kv_lora_rank": 24, "qk_pos_emb_head_dim": 16}, lambda held: 2 * held * (24 + 16)),
    # Layer 0 is full; layer 1 keeps the window, in a slice that a token more belongs to.
    "gate_swa": ({"sliding_window": 8, "full_layers": "0"}, lambda held: (held + 8) * 2 * 2 * 32),
}


@pytest.mark.parametrize("name", TINY_STUDENTS)
def test_decoding_measures_the_cache_that_is_there(tiny_config, name):
    flags, numbers = TINY_STUDENTS[name]
    hf = read_hf_config(tiny_config.parent)
    student = student_attention_class(name).from_flags(flags, hf)
    rows = decode_suite(Workload(hf=hf, student=student, stage=2), [16, 40], [1, 3])
    assert [row["case"].partition(", context ")[2] for row in rows] == [
        "16, 1 sequences",
        "16, 3 sequences",
        "40, 1 sequences",
        "40, 3 sequences",
    ]
    for row, (context, size) in zip(rows, [(16, 1), (16, 3), (40, 1), (40, 3)], strict=True):
        held = context + 12  # three tokens before the clock starts, nine while it runs
        assert row["ours"]["kv_gb"] == round(size * 2 * numbers(held) / 1e9, 9)
        assert row["baseline"]["kv_gb"] == round(size * 2 * 2 * held * 2 * 2 * 32 / 1e9, 9)
        assert row["ratio"] == pytest.approx(row["baseline"]["ms"] / row["ours"]["ms"], rel=1e-2)
