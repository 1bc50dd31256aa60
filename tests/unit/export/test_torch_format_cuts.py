"""The ``torch`` format on random shapes and grids: read back bit for bit, or refused beforehand."""

import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron_attnedit.checkpoint.verify import manifest_of, verify
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.convert.legacy_checkpoint import _load
from megatron_attnedit.convert.weight_mapping import hf_shapes
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.plan import RunSize, plan
from tests.support.conversions import FAMILIES, make, same_files
from tests.support.inputs import make_student

CASES = 40  # of each family, half of which can be cut; the default run takes 12


def write_model(path, **config):
    """A directory of random weights, without building the model."""
    path.mkdir()
    config = {"dtype": "bfloat16", "rope_theta": 1e4, "max_position_embeddings": 64, **config}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text("{}")
    shapes = hf_shapes(teacher_rows(read_hf_config(path)))
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def draw(family, choose):
    """A random model, and a random grid that may or may not cut it."""
    heads = choose([1, 2, 3, 4, 5, 6, 8, 12])
    config = {
        "model_type": family,
        "vocab_size": choose([1, 2, 5, 131]),
        "hidden_size": choose([8, 12, 24, 60]),
        "intermediate_size": choose([1, 12, 24, 60]),
        "num_hidden_layers": choose([1, 2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": choose([g for g in range(1, heads + 1) if heads % g == 0]),
        "head_dim": choose([2, 4, 6]),
        "tie_word_embeddings": choose([False, True]),
    }
    if family == "qwen3_moe":
        config |= {
            "num_experts": choose([1, 2, 4]), "num_experts_per_tok": 1,
            "moe_intermediate_size": choose([1, 6, 12]), "norm_topk_prob": False,
        }  # fmt: skip
    grid = {
        "tensor_model_parallel_size": choose([1, 2, 2, 3, 4, 5, 6]),
        "pipeline_model_parallel_size": choose([1, 1, 2, 3]),
        "expert_model_parallel_size": choose([1, 1, 2]) if family == "qwen3_moe" else 1,
    }
    return config, grid, family == "qwen3_moe" and choose([False, True])


def fits(config, grid):
    """Whether every parallel layer of Megatron has shards of one size, counted by hand."""
    tp, pp, ep = grid.values()
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    widths = [heads, config["hidden_size"], (heads + 2 * groups) * config["head_dim"]]
    widths.append(config.get("moe_intermediate_size", config["intermediate_size"]))
    return (
        not any(width % tp for width in widths)
        and (groups % tp == 0 or tp % groups == 0)
        and config["num_hidden_layers"] % pp == 0
        and config.get("num_experts", 1) % ep == 0
    )


@pytest.mark.parametrize("cases", [12, pytest.param(CASES, marks=pytest.mark.full)])
@pytest.mark.parametrize("family", FAMILIES)
def test_read_back_or_refused(tmp_path, family, cases):
    choose = random.Random(family).choice
    for case in range(cases):
        config, grid, grouped = draw(family, choose)
        while fits(config, grid) != (case % 2 == 0):
            config, grid, grouped = draw(family, choose)
        model = write_model(tmp_path / f"model{case}", **config)
        out = tmp_path / f"out{case}"
        if not fits(config, grid):
            with pytest.raises(UserError, match=r"^--\w+-model-parallel-size \d .*divide"):
                make(model, out, "torch", moe_grouped_gemm=grouped, **grid)
            assert not list(tmp_path.glob("*out*"))
        else:
            make(model, out, "torch", moe_grouped_gemm=grouped, **grid)
            equal_shards(out, grid["tensor_model_parallel_size"])
            same_files(make(out, tmp_path / f"back{case}", "hf"), model)
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)


EXPERTS = {
    "model_type": "qwen3_moe",
    "vocab_size": 5,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 6,
    "norm_topk_prob": False,
}


def test_experts_as_transformer_engine_holds_them(tmp_path):
    """Names and numbers are those of experts one by one, named otherwise; and they are read."""
    model = write_model(tmp_path / "model", **EXPERTS)
    grid = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    single = make(model, tmp_path / "single", "torch", **grid)
    flags = {**grid, "moe_grouped_gemm": True, "transformer_impl": "transformer_engine"}
    grouped = make(model, tmp_path / "grouped", "torch", **flags)
    for file in single.rglob("model_optim_rng.pt"):
        expected = _load(file, mmap=False)["model"]
        found = _load(grouped / file.relative_to(single), mmap=False)["model"]
        assert sum(".experts.linear_fc" in name for name in found) == 2 * 2 * 2
        renamed = {
            re.sub(r"local_experts\.(\d+)\.(linear_fc\d\.weight)", r"\2\1", name): tensor
            for name, tensor in expected.items()
        }
        assert found.keys() == renamed.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in renamed.items())
        # As Transformer Engine leaves it: state of its own besides the weights.
        content = _load(grouped / file.relative_to(single), mmap=False)
        for name in ("linear_fc1._extra_state", "linear_fc2._extra_state"):
            content["model"][f"decoder.layers.0.mlp.experts.{name}"] = torch.empty(0).byte()
        torch.save(content, grouped / file.relative_to(single))
    for name in ("attnedit.json", "complete.json", "manifest.json"):
        (grouped / "iter_0000001" / name).unlink()
    same_files(make(grouped, tmp_path / "back", "hf", teacher=str(model)), model)


def equal_shards(folder, tp):
    """All tensor-parallel ranks hold the same shapes."""
    by_rank = {}
    for file in folder.rglob("model_optim_rng.pt"):
        model = _load(file, mmap=False)["model"]
        rank, _, rest = file.parent.name.removeprefix("mp_rank_").partition("_")
        by_rank.setdefault(rest, {})[rank] = {name: t.shape for name, t in model.items()}
    for ranks in by_rank.values():
        assert len(ranks) == tp
        assert all(shapes == ranks["00"] for shapes in ranks.values())


RAGGED = {
    "model_type": "qwen3", "vocab_size": 7, "hidden_size": 12, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip


def test_five_heads_on_three_ranks(tmp_path):
    """Three queries, a key and a value: each divides, and what Megatron cuts does not."""
    model = write_model(tmp_path / "model", **RAGGED)
    words = r"--tensor-model-parallel-size 3 does not divide the 20 rows"
    with pytest.raises(UserError, match=words):
        make(model, tmp_path / "out", "torch", tensor_model_parallel_size=3)
    assert not list(tmp_path.glob("*out*"))
    hf = read_hf_config(model)
    grid = ParallelConfig(tensor_model_parallel_size=3)
    from megatron_attnedit.attention.gate_swa.config import GateSWA

    student = GateSWA.from_flags({"sliding_window": 8, "full_layers": "1"}, hf)
    with pytest.raises(UserError, match=words):
        plan(hf, student, grid, RunSize(world_size=3, seq_length=64), context=64)


@pytest.mark.parametrize("student", ["mla", "gate_swa"])
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("tp", [2, 3, 4, 6])
def test_a_student_is_read_back_or_refused(tmp_path, student, gate, tp):
    config = {**RAGGED, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}
    write_model(tmp_path / "hf", **config)
    flags = {"sliding_window": 8, "full_layers": "1", "output_gate": gate}
    make_student(tmp_path, "student", student, {} if student == "mla" else flags)
    before = manifest_of(tmp_path / "student")
    try:
        make(tmp_path / "student", tmp_path / "out", "torch", tensor_model_parallel_size=tp)
    except UserError as error:
        assert "--tensor-model-parallel-size" in str(error) and tp in (3, 4)
        assert not list(tmp_path.glob("*out*"))
        return
    equal_shards(tmp_path / "out", tp)
    assert verify(tmp_path / "out", tmp_path / "student")
    assert manifest_of(tmp_path / "out") == before


def test_many_ranks_have_names_of_three_digits(tmp_path):
    config = {**RAGGED, "num_hidden_layers": 1, "num_attention_heads": 101}
    config |= {"num_key_value_heads": 101, "hidden_size": 101, "intermediate_size": 101}
    model = write_model(tmp_path / "model", **{**config, "head_dim": 2})
    out = make(model, tmp_path / "out", "torch", tensor_model_parallel_size=101)
    assert (out / "iter_0000001" / "mp_rank_100").is_dir()
    same_files(make(out, tmp_path / "back", "hf"), model)
