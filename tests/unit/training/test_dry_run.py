"""Dry runs: every shipped recipe passes, and what cannot work is refused by flag."""

import contextlib
import json
from pathlib import Path

import pytest

from megatron_attnedit.errors import UserError
from megatron_attnedit.training.dry_run import dry_run
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from tests.support.models import tiny_data

RECIPES = Path("examples/recipes")
SHIPPED = sorted(RECIPES.glob("*/*/*.yaml"))
MODEL = str(RECIPES / "qwen3_8b")
MLA = ["--teacher", MODEL, "--student-attention", "mla"]


def stage_of(file):
    return Stage1Recipe if file.stem == "stage1" else Stage2Recipe


def student_flags(file):
    """Those that the recipe's first lines name."""
    (line,) = (line for line in file.read_text().splitlines() if "edit_checkpoint.py" in line)
    return line.partition("edit_checkpoint.py")[2].split()


def dry(cls, *argv):
    dry_run(cls, "help", ["--dry-run", *map(str, argv)])


def dry_recipe(file, world_size, target, *more):
    """A shipped recipe on its own teacher."""
    words = ["--recipe", file, "--teacher", file.parents[1], *student_flags(file)]
    dry(stage_of(file), *words, "--world-size", world_size, "--json", target, *more)


def test_recipes_are_there():
    names = {str(file.relative_to(RECIPES)) for file in SHIPPED}
    assert names == {
        f"{model}/{student}/{stage}.yaml"
        for model in ("qwen3_8b", "qwen3_30b_a3b")
        for student in ("mla", "gate_swa")
        for stage in ("stage1", "stage2")
    }


@pytest.mark.parametrize("memory", [80, 64])
@pytest.mark.parametrize("world_size", [8, 16])
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: "-".join(file.with_suffix("").parts[2:]))
def test_a_shipped_recipe(tmp_path, capsys, file, world_size, memory):
    target = tmp_path / "plan.json"
    dry_recipe(file, world_size, target, "--device-memory-gib", memory)
    found = json.loads(target.read_text())
    assert found["world_size"] == world_size
    assert found["student_attention"]["name"] == file.parent.name
    for stage in found["memory"]:
        parts = ("parameters", "gradients", "optimizer", "activations")
        assert all(stage[part] > 0 for part in parts)
        assert stage["total"] == sum(stage[part] for part in parts) < memory * 2**30
    assert f"{world_size} processes" in capsys.readouterr().out


def recipe_row(file, folder):
    """The recipe's line of the table in docs/howto/choose_parallelism.md."""
    held = []
    for world_size in (8, 16):
        target = folder / f"{world_size}.json"
        with contextlib.redirect_stdout(None):
            dry_recipe(file, world_size, target)
        found = json.loads(target.read_text())
        held.append(max(stage["total"] for stage in found["memory"]) / 2**30)
    recipe = found["recipe"]
    experts = recipe["expert_model_parallel_size"]
    grid = f"expert parallelism {experts}" if experts > 1 else "data parallelism alone"
    tokens = recipe["train_iters"] * recipe["global_batch_size"] * recipe["seq_length"] / 1e6
    name = "/".join(file.parts[-3:])
    return f"| `{name}` | {grid} | {tokens:.0f} M | {held[0]:.1f} / {held[1]:.1f} GiB |"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: "-".join(file.parts[2:]))
def test_figures_in_the_docs(tmp_path, file):
    page = Path("docs/howto/choose_parallelism.md").read_text()
    assert recipe_row(file, tmp_path) in page.splitlines()


def test_everything_trained_needs_a_larger_grid():
    file = RECIPES / "qwen3_8b" / "mla" / "stage2.yaml"
    everything = ["--recipe", file, *MLA, "--world-size", 8, "--trainable", "all"]
    with pytest.raises(UserError, match="--device-memory-gib 80: pipeline stage 0 needs"):
        dry(Stage2Recipe, *everything)
    dry(Stage2Recipe, *everything, "--tensor-model-parallel-size", 2, "--sequence-parallel")


def test_an_optimizer_on_the_host_leaves_the_device(tmp_path, capsys):
    """Qwen3-8B, everything trained: too much for one process, until the states are the host's."""
    target = tmp_path / "plan.json"
    flags = [*MLA, "--bf16", "--trainable", "all", "--use-distributed-optimizer"]
    flags += ["--device-memory-gib", 141, "--json", target]
    with pytest.raises(UserError, match="pipeline stage 0 needs"):
        dry(Stage2Recipe, *flags)
    (before,) = json.loads(target.read_text())["memory"]
    dry(Stage2Recipe, *flags, "--optimizer-cpu-offload")
    (after,) = json.loads(target.read_text())["memory"]
    assert (before["host"], after["optimizer"]) == (0, 0)
    assert before["optimizer"] == 3 * before["gradients"]
    assert after["host"] == before["optimizer"] + before["gradients"]
    assert before["total"] - after["total"] == before["optimizer"]
    assert f"{after['host'] / 2**30:.1f} GiB of the host's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer-cpu-offload"], "--optimizer-cpu-offload needs --bf16 and"),
        (["--world-size", 0], "--world-size 0"),
        (["--world-size", 6, "--tensor-model-parallel-size", 4], "number of processes 6"),
        (["--tensor-model-parallel-size", 3], "num_attention_heads 32"),
        (["--pipeline-model-parallel-size", 5], "num_hidden_layers 36"),
        (["--world-size", 8, "--global-batch-size", 12], "--global-batch-size 12"),
        (["--context-parallel-size", 8, "--seq-length", 4090], "--seq-length 4090"),
        (["--expert-model-parallel-size", 8], "--expert-model-parallel-size"),
        (["--seed", -1], "--seed -1: expected 0 to"),
        (["--lr-warmup-iters", 1000], "--lr-warmup-iters 1000"),
        (["--device-memory-gib", 20], "--device-memory-gib 20"),
        (["--device-memory-gib", "nan"], "--device-memory-gib nan: expected a positive, finite"),
        (["--device-memory-gib", "inf"], "--device-memory-gib inf: expected a positive, finite"),
        (["--world-size", 10**12], "--world-size 1000000000000"),
    ],
)
def test_refused(flags, message):
    flags = flags if "--world-size" in flags else ["--world-size", 240, *flags]
    flags = flags if "--global-batch-size" in flags else ["--global-batch-size", 240, *flags]
    with pytest.raises(UserError, match=message) as error:
        dry(Stage1Recipe, *MLA, "--bf16", *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--save", "--data-cache-path"])
def test_a_folder_that_cannot_be_made(tmp_path, flag):
    file = tmp_path / "file"
    file.write_text("")
    flags = [*MLA, "--bf16", "--device-memory-gib", 1000]
    dry(Stage1Recipe, *flags, flag, tmp_path / "new" / "folder")
    for folder in (file, file / "run"):
        with pytest.raises(UserError, match=f"^{flag} {folder}: {file} is not a folder$"):
            dry(Stage1Recipe, *flags, flag, folder)


def test_a_window_that_covers_the_sequence():
    flags = ["--teacher", MODEL, "--student-attention", "gate_swa", "--sliding-window", 4096]
    with pytest.raises(UserError, match="--seq-length 4096 is not longer"):
        dry(Stage1Recipe, *flags)


def test_a_student_that_is_not_there():
    with pytest.raises(UserError, match="--load nowhere: not there; --student-attention"):
        dry(Stage1Recipe, "--teacher", MODEL, "--load", "nowhere")


def test_the_pipeline_s_stages_are_told_apart(tmp_path):
    target = tmp_path / "plan.json"
    dry(
        Stage2Recipe,
        *MLA,
        "--bf16",
        "--world-size",
        4,
        "--pipeline-model-parallel-size",
        4,
        "--json",
        target,
    )
    first, *middle, last = json.loads(target.read_text())["memory"]
    table = 151936 * 4096 * 2  # embedding and output head, bfloat16
    assert {stage["parameters"] for stage in middle} == {first["parameters"] - table}
    assert last["parameters"] == first["parameters"] + 4096 * 2
    held = [stage["activations"] for stage in (first, *middle)]
    assert held == sorted(held, reverse=True) and held[0] > 1.9 * held[-1]


def test_data_is_looked_at(models, tmp_path, capsys):
    prefix = tiny_data(tmp_path / "data", models("qwen3"))
    tiny = ["--teacher", models("qwen3"), "--student-attention", "mla", "--seq-length", 64]
    flags = ["--train-iters", 10, "--global-batch-size", 64, "--train-data-path"]
    dry(Stage1Recipe, *tiny, *flags, prefix)
    assert "each read 10.00 times" in capsys.readouterr().out
    dry(Stage1Recipe, *tiny, *flags, "0.3", prefix, "0.7", prefix)
    assert "each read 5.00 times" in capsys.readouterr().out
    with pytest.raises(UserError, match="more than --max-epochs 5"):
        dry(Stage1Recipe, *tiny, *flags, prefix, "--max-epochs", 5)
    dry(Stage1Recipe, *tiny, *flags, str(tmp_path / "elsewhere"))
    assert "not here" in capsys.readouterr().out
