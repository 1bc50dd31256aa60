"""What is cheap to find out is found before a teacher is loaded, by runs and dry runs alike."""

import json
import shutil
from unittest import mock

import pytest

from megatron_attnedit.checkpoint.conversion import ConversionConfig, convert
from megatron_attnedit.convert.integrity import MARKER, seal
from megatron_attnedit.errors import UserError
from megatron_attnedit.training import run as runs
from megatron_attnedit.training.dry_run import dry_run
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from tests.support import processes
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe
from tests.support.models import tiny_hf_dir

STAGES = [Stage1Recipe, Stage2Recipe]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(
        tmp_path_factory.mktemp("inputs"), num_hidden_layers=2, max_position_embeddings=8192
    )
    other = tiny_hf_dir(folder / "other", num_hidden_layers=2, rms_norm_eps=1e-5, hidden_size=32)
    for source, name in ((folder / "hf", "imported"), (other, "imported_other")):
        convert(ConversionConfig(source=source, output=folder / name, format="torch_dist"))
    whole = shutil.copytree(folder / "gate_swa", folder / "whole") / "iter_0000000"
    lineage = json.loads((whole / "attnedit.json").read_text())
    (whole / "attnedit.json").write_text(json.dumps({**lineage, "trainable": "all"}))
    (whole / MARKER).unlink()
    seal(whole)
    return folder


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def called(*args, **kwargs):
        raise AssertionError("a teacher was loaded, or processes were started")

    for name in ("load_teacher", "start_processes"):
        monkeypatch.setattr(runs, name, called)


# Changed fields ({} is the inputs' folder), words of the refusal, and whether a dry run finds it.
CASES = {
    "batch": ({"global_batch_size": 3}, "--global-batch-size 3 is not a multiple", True),
    "window": ({"seq_length": 8}, "--seq-length 8", True),
    "heads": ({"tensor_model_parallel_size": 3}, "--tensor-model-parallel-size 3", True),
    "layers": ({"pipeline_model_parallel_size": 3}, "--pipeline-model-parallel-size 3", True),
    "no data": ({"train_data_path": ["{}/nowhere"]}, "nowhere.bin is missing", False),
    "half the data": ({"train_data_path": ["{}/half"]}, "half.idx is missing", True),
    "no validation data": ({"valid_data_path": ["{}/nowhere"]}, "--valid-data-path", False),
    "short data": ({"seq_length": 5000}, "too few for one sample of --seq-length 5000", True),
    "read too often": ({"max_epochs": 0.1}, "more than --max-epochs 0.1", True),
    "another run": ({"save": "{}/mla"}, "holds a run with another stage (edit", True),
    "trained whole": ({"load": "{}/whole"}, "give --trainable all", True),
    "no student": ({"load": "{}/imported"}, "holds a teacher", True),
    "another teacher": ({"teacher": "{}/imported_other"}, "whose weights are not those", True),
    "host's optimizer": (
        {"optimizer_cpu_offload": True, "bf16": True, "use_distributed_optimizer": True},
        "--optimizer-cpu-offload: this machine has no accelerator", False,
    ),
    "backend": ({"attention_backend": "npu_fusion"}, "--attention-backend npu_fusion", False),
    "wandb": ({"wandb_project": "p"}, "--wandb-project p", False),
}  # fmt: skip


def changed(inputs, fields):
    def fill(value):
        if isinstance(value, list):
            return [fill(entry) for entry in value]
        return value.format(inputs) if isinstance(value, str) else value

    return {name: fill(value) for name, value in fields.items()}


@pytest.mark.parametrize("case", CASES)
def test_before_anything_is_loaded(inputs, tmp_path, nothing_is_loaded, monkeypatch, case):
    fields, words, by_dry_run = CASES[case]
    shutil.copy(inputs / "data.bin", inputs / "half.bin")
    if case == "wandb":
        sink = "megatron_attnedit.training.weights_and_biases"
        monkeypatch.setattr(f"{sink}.find_spec", lambda name: None)
    for cls in STAGES:
        given = {"save": tmp_path / "run", **changed(inputs, fields)}
        recipe = small_recipe(cls, inputs, "gate_swa", given.pop("save"), **given)
        with pytest.raises(UserError) as error:
            runs.run(recipe)
        assert words in str(error.value) and "\n" not in str(error.value)
        if by_dry_run:
            with pytest.raises(UserError) as error:
                dry_run(cls, "", ["--dry-run", *flags(recipe)])
            assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def flags(recipe):
    """The command line of a recipe."""
    found = []
    for name, value in vars(recipe).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value not in (None, "", []):
            found += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def test_the_good_one_passes(inputs, tmp_path, nothing_is_loaded, capsys):
    """So every refusal above is of what was changed."""
    for cls in STAGES:
        fields = {"teacher": str(inputs / "imported")}
        recipe = small_recipe(cls, inputs, "gate_swa", tmp_path / "run", **fields)
        with pytest.raises(AssertionError, match="was loaded"):
            runs.run(recipe)
        dry_run(cls, "", ["--dry-run", *flags(recipe)])
        assert "each read" in capsys.readouterr().out


def once(recipe, loads):
    """Its exit code and what it says, on a process that loads a teacher or does not."""
    loader = mock.Mock(side_effect=runs.load_teacher)
    with (
        mock.patch.object(runs, "load_teacher", loader),
        mock.patch.object(runs.logger, "info") as log,
    ):
        code = runs.run(recipe)
    assert loader.called == loads
    return code, [call.args[0] % call.args[1:] for call in log.call_args_list]


@pytest.mark.parametrize("cls", STAGES)
def test_a_finished_run_says_so(inputs, tmp_path, cls):
    save = tmp_path / "run"
    recipe = small_recipe(cls, inputs, "mla", save, train_iters=2)
    ((code, _),) = processes.run(1, once, recipe, True)
    assert code == 0
    lines = (save / "metrics.jsonl").read_text()
    (save / "heartbeat.json").write_text("{}")
    for train_iters in (2, 1):
        shorter = small_recipe(cls, inputs, "mla", save, train_iters=train_iters)
        answers = processes.run(2, once, shorter, False)
        assert [code for code, _ in answers] == [0, 0]
        said = f"finished already, at iteration 2 of --train-iters {train_iters}"
        assert said in answers[0][1][0]
        assert json.loads((save / "heartbeat.json").read_text())["state"] == "finished"
    assert (save / "metrics.jsonl").read_text() == lines
    file = save / "iter_0000002" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(AssertionError, match="no checkpoint there is usable"):  # it is not the end
        processes.run(1, once, recipe, True)
