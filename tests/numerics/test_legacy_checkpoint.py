"""``mp_rank_*`` files: on every layout, in both layouts of experts, ours and another program's."""

import json
import pickle
import shutil

import pytest
import torch

from megatron_attnedit.checkpoint.verify import manifest_of, verify
from megatron_attnedit.convert.legacy_checkpoint import _load
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig, place_of_this_process
from megatron_attnedit.training.setup import load_teacher, start_processes
from tests.support import processes
from tests.support.conversions import FAMILIES, change_config, make, same_files
from tests.support.inputs import make_student
from tests.support.thinning import every_other

SIZES = [1, 2, 4]


@pytest.mark.parametrize(
    ("family", "tied", "tp", "pp"), every_other(FAMILIES, [False, True], SIZES, SIZES, of=4)
)
def test_round_trip(models, tmp_path, family, tied, tp, pp):
    source = models(family, tied)
    for ep in SIZES if family == "qwen3_moe" else [1]:
        folder = tmp_path / f"ep{ep}"
        make(
            source,
            folder,
            "torch",
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            moe_grouped_gemm=family == "qwen3_moe" and tied != (ep == 2),
        )
        files = list(folder.rglob("model_optim_rng.pt"))
        assert len(files) == tp * pp * ep
        same_files(make(folder, tmp_path / f"back{folder.name}", "hf"), source)


def equals_built(source, folder, flags, grouped):
    """Rank files hold what this rank's model holds, under Megatron's local names."""
    grid = ParallelConfig(**flags)
    accelerator = start_processes(grid)
    teacher = load_teacher(str(source), grid, torch.bfloat16, accelerator, moe_grouped_gemm=grouped)
    place = place_of_this_process()
    from megatron.core import parallel_state

    pp = parallel_state.get_pipeline_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank()
    name = f"mp_rank_{place.rank:02d}" + (f"_{pp:03d}" if "pipeline" in str(flags) else "")
    name += f"_{ep:03d}" if "expert_model" in str(flags) else ""
    content = _load(folder / "iter_0000001" / name / "model_optim_rng.pt", mmap=False)
    mine = dict(teacher.chunks[0].named_parameters())
    assert content["model"].keys() == mine.keys()
    differ = [name for name in mine if not torch.equal(content["model"][name], mine[name])]
    assert not differ, differ
    assert any("experts.weight1" in name for name in mine) == grouped
    assert content["checkpoint_version"] == 3.0
    return content["args"].num_layers


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "family, grouped", [("qwen3", False), ("qwen3_moe", False), ("qwen3_moe", True)]
)
def test_files_are_what_megatron_builds(models, tmp_path, family, grouped, tied):
    flags = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    make(models(family, tied), tmp_path / "torch", "torch", moe_grouped_gemm=grouped, **flags)
    if family == "qwen3_moe":
        flags |= {"sequence_parallel": True, "expert_tensor_parallel_size": 2}
    answers = processes.run(
        4, equals_built, models(family, tied), tmp_path / "torch", flags, grouped
    )
    assert answers == [4] * 4


def test_grouped_experts_of_each_rank(models, tmp_path):
    flags = {"expert_model_parallel_size": 2}
    source = models("qwen3_moe")
    make(source, tmp_path / "torch", "torch", moe_grouped_gemm=True, **flags)
    processes.run(2, equals_built, source, tmp_path / "torch", flags, True)


@pytest.fixture
def foreign(models, tmp_path):
    """As another program leaves it: no lineage, no seal, padded vocabulary, ``release``."""
    folder = tmp_path / "foreign"
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    make(models("qwen3_moe"), folder, "torch", moe_grouped_gemm=True, **sizes)
    start = folder / "iter_0000001"
    for name in ("attnedit.json", "complete.json", "manifest.json"):
        (start / name).unlink()
    shutil.rmtree(start / "hf")
    for stage in range(2):
        files = [start / f"mp_rank_{tp:02d}_{stage:03d}" / "model_optim_rng.pt" for tp in range(2)]
        contents = [_load(file, mmap=False) for file in files]
        models_of_ranks = [content["model"] for content in contents]
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if name in models_of_ranks[0]:
                whole = torch.cat([model[name] for model in models_of_ranks])
                whole = torch.nn.functional.pad(whole, (0, 0, 0, 256 - len(whole)))
                for model, shard in zip(models_of_ranks, whole.chunk(2), strict=True):
                    model[name] = shard.clone()
        for file, content in zip(files, contents, strict=True):
            content["model"]["decoder.layers.0.self_attention._extra_state"] = None
            torch.save(content, file)
    start.rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    return folder


def test_another_programs_files(models, foreign, tmp_path):
    """``--teacher`` lends ``config.json``; a student of the result belongs to it."""
    source = models("qwen3_moe")
    with pytest.raises(UserError, match="--teacher, a directory with its config.json"):
        make(foreign, tmp_path / "hf", "hf")
    same_files(make(foreign, tmp_path / "hf", "hf", teacher=str(source)), source)
    other = shutil.copytree(source, tmp_path / "other")
    change_config(other, dtype="float32")
    with pytest.raises(UserError, match="is bfloat16, .* says float32; give --dtype"):
        make(foreign, tmp_path / "rounded", "hf", teacher=str(other))
    assert verify(foreign, source, teacher=str(source))
    make(foreign / "release", tmp_path / "teacher", teacher=str(source))
    lineage = json.loads((tmp_path / "teacher/iter_0000000/attnedit.json").read_text())
    assert len(lineage["teacher_fingerprint"]) == 32
    (tmp_path / "teacher").rename(tmp_path / "imported")
    (tmp_path / "hf").rename(tmp_path / "teacher")
    make_student(tmp_path, "student", "gate_swa", {"sliding_window": 8}, teacher="imported")
    for teacher in ("imported", "teacher"):
        assert manifest_of(tmp_path / "student", str(tmp_path / teacher))


def test_another_number_of_experts(models, foreign, tmp_path):
    config = shutil.copytree(models("qwen3_moe"), tmp_path / "config")
    for count in (4, 6, 16):
        change_config(config, num_experts=count, num_local_experts=count)
        with pytest.raises(UserError, match="experts"):
            make(foreign, tmp_path / "out", "hf", teacher=str(config))


def test_nothing_in_the_files_is_run(models, foreign, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    file = foreign / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    torch.save({"model": {}, "rng_state": Evil()}, file)
    with pytest.raises(UserError, match="mp_rank_01_001.*cannot be loaded"):
        make(foreign, tmp_path / "out", "hf", teacher=str(models("qwen3_moe")))
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="mp_rank_01_001.*cannot be loaded"):
        make(foreign, tmp_path / "out", "hf", teacher=str(models("qwen3_moe")))
    assert not (tmp_path / "ran").exists()
    torch.save({"model0": {}}, file)
    with pytest.raises(UserError, match="model0"):
        make(foreign, tmp_path / "out", "hf", teacher=str(models("qwen3_moe")))
