"""Recipes: files, flags, and refusals in the user's words."""

from pathlib import Path

import pytest
import yaml

from megatron_attnedit.errors import UserError
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.recipe_files import parse_recipe, parser_for, to_yaml

NEEDED = ["--teacher", "t", "--load", "l", "--save", "s", "--train-data-path", "d"]


def parse(*argv, cls=Stage2Recipe):
    return parse_recipe(cls, "help", [*NEEDED, *argv])


def refused(words, *argv, cls=Stage2Recipe):
    with pytest.raises(UserError) as error:
        parse(*argv, cls=cls)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def recipe_file(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return str(file)


def test_flags_override_the_file(tmp_path):
    file = recipe_file(tmp_path, "lr: 2e-4\ntrain_iters: 7\nbf16: true\n")
    recipe = parse("--recipe", file, "--train-iters", "9", "--no-bf16")
    assert (recipe.lr, recipe.train_iters, recipe.bf16) == (2e-4, 9, False)


def test_what_is_written_reads_back(tmp_path):
    recipe = parse("--lr", "0.5", "--valid-data-path", "0.3", "a", "0.7", "b")
    file = recipe_file(tmp_path, to_yaml(recipe))
    assert parse_recipe(Stage2Recipe, "", ["--recipe", file]) == recipe


def test_unknown_key(tmp_path):
    file = recipe_file(tmp_path, "learning_rate: 1\n")
    refused(["run.yaml", "unknown key 'learning_rate'", "lr"], "--recipe", file)


@pytest.mark.parametrize("line", ["train_iters: many", "lr: fast", "bf16: 1", "train_iters: true"])
def test_wrong_value_type(tmp_path, line):
    file = recipe_file(tmp_path, line + "\n")
    refused(["run.yaml", line.split(":")[0], "expected"], "--recipe", file)


@pytest.mark.parametrize("key", ["train-iters", "Train_Iters", "train_iter"])
def test_a_key_close_to_a_known_one(tmp_path, key):
    file = recipe_file(tmp_path, f"{key}: 5\n")
    refused([f"run.yaml: unknown key '{key}'; did you mean 'train_iters'?"], "--recipe", file)


def test_a_key_that_resembles_none(tmp_path):
    file = recipe_file(tmp_path, "1: 5\n")
    refused(["unknown key 1; known keys: ", "train_iters"], "--recipe", file)


def test_a_key_given_twice(tmp_path):
    file = recipe_file(tmp_path, "lr: 1\nseed: 2\n'lr': 3\n")
    refused(["run.yaml: key 'lr' is there more than once"], "--recipe", file)


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_file_gives_nothing(tmp_path, text):
    assert parse("--recipe", recipe_file(tmp_path, text)) == parse()


def test_not_utf_8(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes("lr: 1  # gr\u00f6\u00dfer\n".encode("latin-1"))
    refused(["run.yaml: not UTF-8 text, from byte 11 on"], "--recipe", str(file))


def test_a_date_that_is_none(tmp_path):
    refused(["run.yaml", "not valid YAML"], "--recipe", recipe_file(tmp_path, "lr: 2024-13-45\n"))


def test_not_yaml(tmp_path):
    refused(["run.yaml", "not valid YAML"], "--recipe", recipe_file(tmp_path, "a: [1\n"))


def test_missing_file():
    refused(["nowhere.yaml", "no such file"], "--recipe", "nowhere.yaml")
    refused(["no such file"], "--recipe", "n" * 300)


@pytest.mark.parametrize("missing", ["teacher", "load", "save", "train-data-path"])
def test_required(missing):
    at = NEEDED.index(f"--{missing}")
    with pytest.raises(UserError, match=f"--{missing} is required"):
        parse_recipe(Stage1Recipe, "", NEEDED[:at] + NEEDED[at + 2 :])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--train-iters", "0"], ["--train-iters 0", "positive"]),
        (["--seed", "-1"], ["--seed -1", "0 to 4294967295"]),
        (["--seed", str(2**32)], ["--seed 4294967296", "0 to 4294967295"]),
        (["--min-lr", "1"], ["--min-lr 1.0", "--lr"]),
        (["--kl", "sideways"], ["--kl 'sideways'", "forward"]),
        (["--trainable", "mlp"], ["--trainable 'mlp'", "attention, all"]),
        (["--attention-backend", "magic"], ["--attention-backend 'magic'"]),
        (["--overlap-param-gather"], ["--overlap-param-gather needs --overlap-grad-reduce"]),
        (["--lr-decay-style", "WSD"], ["--lr-wsd-decay-iters 0", "from 1 to the 1000 iterations"]),
        (["--lr-wsd-decay-iters", "5"], ["--lr-wsd-decay-iters 5", "needs --lr-decay-style WSD"]),
    ],
)
def test_refused_values(argv, words):
    refused(words, *argv)


def test_a_recorded_run_cannot_overlap():
    with pytest.raises(
        UserError, match="--enable-cuda-graph does not go with --overlap-grad-reduce"
    ):
        parse("--enable-cuda-graph", "--overlap-grad-reduce", cls=Stage1Recipe)


def test_a_recorded_teacher_has_no_features():
    with pytest.raises(
        UserError, match="--enable-cuda-graph does not go with --feature-matching-weight"
    ):
        parse("--enable-cuda-graph", "--feature-matching-weight", "0.1", cls=Stage2Recipe)
    assert parse("--enable-cuda-graph", "--overlap-grad-reduce", cls=Stage2Recipe).enable_cuda_graph


@pytest.mark.parametrize("flag", ["--scheduled-sampling-start", "--scheduled-sampling-end"])
@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan"])
def test_probabilities_are_from_0_to_1(flag, value):
    refused([f"{flag} {float(value)}", "from 0 to 1"], flag, value, cls=Stage1Recipe)


def test_global_batch_that_does_not_divide():
    recipe = parse("--global-batch-size", "6", "--micro-batch-size", "4")
    with pytest.raises(UserError, match="--global-batch-size 6 is not a multiple"):
        recipe.num_microbatches(1)


@pytest.mark.parametrize("cls", [Stage1Recipe, Stage2Recipe])
def test_help_states_defaults(cls):
    text = parser_for(cls, "what it does").format_help()
    for name in cls.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("(default:") >= len(cls.__dataclass_fields__)


def test_the_quick_start_s_recipes_are_valid():
    files = sorted(Path("examples/quickstart").glob("*.yaml"))
    assert len(files) == 4
    for file in map(str, files):
        cls = Stage1Recipe if "stage1" in file else Stage2Recipe
        recipe = parse("--recipe", file, cls=cls)
        assert recipe.seq_length == yaml.safe_load(Path(file).read_text())["seq_length"]
