"""An imported teacher is the same on every layout, whichever format it is loaded from."""

import pytest
import torch

from megatron_attnedit.checkpoint.conversion import ConversionConfig, convert
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.setup import load_teacher, start_processes
from tests.support import processes
from tests.support.models import tiny_hf_dir
from tests.support.thinning import every_other

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
GRIDS = {
    "one process": (1, {}),
    "TP2 SP": (2, TP2_SP),
    "PP2": (2, PP2),
    "PP2 interleaved": (2, PP2 | {"num_virtual_stages_per_pipeline_rank": 2}),
    "PP2 uneven": (2, PP2 | {"pipeline_model_parallel_layout": "Ettt|tL"}),
    "EP2": (2, EP2),
    "ETP2": (2, TP2_SP | {"expert_tensor_parallel_size": 2}),
    "TP2 SP x PP2 x EP2": (4, TP2_SP | PP2 | EP2),
}


def load_both_ways(hf_dir, megatron_dir, flags, grouped):
    """Names of parameters, after checking that both formats fill them with the same bits."""
    grid = ParallelConfig(**flags)
    accelerator = start_processes(grid)
    dtype = torch.bfloat16
    ours, theirs = (
        load_teacher(str(source), grid, dtype, accelerator, moe_grouped_gemm=grouped)
        for source in (megatron_dir, hf_dir)
    )
    assert ours.fingerprint == theirs.fingerprint
    names = []
    for chunk, other in zip(ours.chunks, theirs.chunks, strict=True):
        expected = dict(other.named_parameters())
        for name, param in chunk.named_parameters():
            assert torch.equal(param, expected[name]), name
            names.append(name)
    assert any(name.endswith("experts.weight1") for name in names) == grouped
    return names


@pytest.mark.parametrize(
    ("kind", "tied", "grid"),
    every_other(["dense", "experts", "grouped experts"], [False, True], GRIDS, of=4),
)
def test_both_formats_load_alike(tmp_path, kind, tied, grid):
    world_size, flags = GRIDS[grid]
    if kind == "dense" and ("EP2" in grid or "ETP2" in grid):
        pytest.skip("no experts")
    family = "qwen3" if kind == "dense" else "qwen3_moe"
    hf_dir = tiny_hf_dir(
        tmp_path / "hf", family, num_hidden_layers=4, tie_word_embeddings=tied, dtype="bfloat16"
    )
    convert(ConversionConfig(source=hf_dir, output=tmp_path / "megatron", format="torch_dist"))
    arguments = hf_dir, tmp_path / "megatron", flags, kind == "grouped experts"
    for names in processes.run(world_size, load_both_ways, *arguments):
        assert names
