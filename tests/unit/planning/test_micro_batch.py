"""The proposed micro-batch fits, and the next larger one would not."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.memory import RESERVE_BYTES, Workload, memory_of_stages
from megatron_attnedit.planning.micro_batch import largest_micro_batch

QWEN3_8B = Path(__file__).parents[3] / "examples" / "recipes" / "qwen3_8b"


def held(hf, student, parallel, work, size):
    samples = work.micro_batch_size * work.num_microbatches
    sized = replace(work, micro_batch_size=size, num_microbatches=samples // size)
    return max(m.total for m in memory_of_stages(hf, student, parallel, sized)) + RESERVE_BYTES


@pytest.mark.parametrize(
    ("stages", "gib", "expected"),
    [(1, 40, None), (1, 64, 1), (1, 80, 2), (1, 141, 4), (2, 141, 1)],
)
def test_the_largest_that_fits(stages, gib, expected):
    hf = read_hf_config(QWEN3_8B)
    student = MLA.from_flags({}, hf)
    parallel = ParallelConfig(pipeline_model_parallel_size=stages)
    work = Workload(
        stage=2,
        bytes_per_number=2,
        seq_length=4096,
        micro_batch_size=1,
        num_microbatches=16,
        data_parallel_size=8,
        expert_data_parallel_size=8,
        use_distributed_optimizer=True,
    )
    found = largest_micro_batch(hf, student, parallel, work, gib * 2**30)
    assert (found and found.size) == expected
    if found and stages == 1:
        assert held(hf, student, parallel, work, found.size) <= gib * 2**30
        assert held(hf, student, parallel, work, 2 * found.size) > gib * 2**30
