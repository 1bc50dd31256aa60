"""The memory model against the peaks measured on a GPU (docs/data/performance.json)."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.convert.hf_config import read_hf_config
from tools.benchmark.stage_speed import describe, predicted_peak_gb
from tools.benchmark.workload import Workload

ROOT = Path(__file__).parents[3]
ROWS = json.loads((ROOT / "docs" / "data" / "performance.json").read_text())
TOLERANCE = 0.026  # what docs/howto/run.md claims


def workloads():
    """What the rows may be of."""
    for model, layers in (("qwen3_8b", (36, 18, 9, 8)), ("qwen3_30b_a3b", (16, 12, 8))):
        whole = read_hf_config(ROOT / "examples" / "recipes" / model)
        students = [MLA.from_flags({"kv_lora_rank": rank}, whole) for rank in (512, 256)]
        # The rows were measured with every fifth layer full, and without sinks.
        fifth = ",".join(map(str, range(4, whole.num_hidden_layers, 5)))
        students += [
            GateSWA.from_flags(
                {"sliding_window": window, "full_layers": fifth, "sink": "none"}, whole
            )
            for window in (128, 1024)
        ]
        for count, student, (
            stage,
            own,
        ), length, batches, grouped, trained, recompute in itertools.product(
            layers,
            students,
            ((1, False), (1, True), (2, False)),
            (4096, 16384, 32768),
            (1, 4),
            (False, True),
            (("attention", False), ("all", False), ("all", True)),
            ("none", "selective", "full"),
        ):
            trainable, on_host = trained
            work = Workload(
                hf=dataclasses.replace(whole, num_hidden_layers=count),
                student=student,
                stage=stage,
                seq_length=length,
                micro_batches=batches,
                trainable=trainable,
                moe_grouped_gemm=grouped,
                recompute=recompute,
                optimizer_cpu_offload=on_host,
                runs_student=own,
            )
            yield work
            if (trainable, recompute) == ("attention", "none"):
                yield from in_fp8_and_larger(work)


def in_fp8_and_larger(work):
    """The same with frozen layers in FP8, and with more samples at a time."""
    for size, layers in itertools.product((1, 2, 4, 8), ("", "mlp", "all")):
        precision = {"frozen_precision": "fp8", "frozen_precision_layers": layers} if layers else {}
        if precision or size > 1:
            yield dataclasses.replace(work, micro_batch_size=size, **precision)


@pytest.fixture(scope="module")
def by_case():
    """Workloads by suite and case."""
    return {(f"stage{work.stage}", describe(work)): work for work in workloads()}


def test_fp8_saves_a_byte_a_number_in_stage_1_and_adds_one_in_stage_2():
    hf = read_hf_config(ROOT / "examples" / "recipes" / "qwen3_8b")
    mlps = 36 * 3 * 4096 * 12288 / 1e9
    for stage, more in ((1, -mlps), (2, mlps)):
        work = Workload(hf=hf, student=MLA.from_flags({}, hf), stage=stage)
        in_fp8 = dataclasses.replace(work, frozen_precision="fp8")
        assert predicted_peak_gb(in_fp8) == pytest.approx(predicted_peak_gb(work) + more, abs=0.011)


def test_within_tolerance_of_every_measured_peak(by_case):
    compared = 0
    for row in ROWS:
        if row["suite"] not in ("stage1", "stage2") or "peak_gb" not in row["ours"]:
            continue
        work = by_case.get((row["suite"], row["case"]))
        assert work is not None, f"no workload of this name: {row['case']}"
        measured, predicted = row["ours"]["peak_gb"], predicted_peak_gb(work)
        error = predicted / measured - 1
        name = f"{row['suite']} {row['case']}"
        print(f"{name}: {predicted:.2f} GB, measured {measured}, {error:+.1%}")
        assert abs(error) < TOLERANCE, row["case"]
        compared += 1
    assert compared >= 22
