"""Every field of a recipe against every kind of bad value, by file, command line and call."""

import dataclasses
import time

import pytest

from megatron_attnedit.errors import UserError
from megatron_attnedit.training.recipe import MOST_SAMPLES, Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.recipe_files import LARGEST_FILE, parse_recipe, read_recipe_file

NEEDED = {"teacher": "t", "load": "l", "save": "s", "train_data_path": ["d"]}
CLASSES = [Stage1Recipe, Stage2Recipe]
FIELDS = [(cls, item) for cls in CLASSES for item in dataclasses.fields(cls)]
NUMBERS = [(cls, item) for cls, item in FIELDS if item.type in (int, float, "int", "float")]
# YAML, what it is, and whether numbers could be of it.
TEXTS = [
    "x", "null", "[1]", "[]", "[[1]]", "{a: 1}", ".inf", "-.inf", ".nan", "-1", "9" * 400,
    "9" * 5000, "1e400", "true", "2020-01-01", "!!binary aGk=", "!!set {a, b}", '"a\\0"',
    '"a\\nb"', "'" + "a" * 300 + "'", "[null]", "[true]", "!!python/object:os.system x", "*a",
    "&a [*a]", "2020-13-45",
]  # fmt: skip


def answer(cls, file, given):
    """The refusal, or the recipe; anything else fails the test."""
    start = time.monotonic()
    try:
        found = cls(**{**given, **read_recipe_file(cls, file)})
    except UserError as error:
        found = error
        assert "\n" not in str(error) and len(str(error)) < 1500
    assert time.monotonic() - start < 5
    return found


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_of_a_file(tmp_path, cls):
    file = tmp_path / "run.yaml"
    for item in dataclasses.fields(cls):
        for text in TEXTS:
            file.write_text(f"{item.name}: {text}\n")
            found = answer(cls, file, NEEDED)
            is_text = item.type in ("str", "list[str]", str, list[str])
            if isinstance(found, UserError):
                name = f"--{item.name.replace('_', '-')}"
                assert "run.yaml" in str(found) or name in str(found), (item.name, text)
            elif not is_text:
                assert text in ("true", "null"), (item.name, text, getattr(found, item.name))


@pytest.mark.parametrize(("cls", "item"), NUMBERS, ids=lambda v: getattr(v, "name", None))
def test_every_number_by_call(cls, item):
    flag = f"--{item.name.replace('_', '-')} "
    bad = [True, None, "1", [1], float("nan"), float("inf"), -float("inf"), -1, 10**400]
    if item.type in (int, "int"):
        bad += [1.5, 1.0, 2**31 * 2]
    for value in bad:
        with pytest.raises(UserError) as error:
            cls(**{**NEEDED, item.name: value})
        assert str(error.value).startswith(flag), str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adam-beta2", "1.5"], "--adam-beta2 1.5: expected a number from 0 to less than 1"),
        (["--adam-beta1", "1"], "--adam-beta1 1.0: expected a number from 0 to less than 1"),
        (["--adam-eps", "0"], "--adam-eps 0.0: expected a number from above 0 to 1"),
        (["--clip-grad", "-1"], "--clip-grad -1.0: expected 0 or a positive number"),
        (["--weight-decay", "-0.1"], "--weight-decay -0.1: expected 0 or a positive number"),
        (["--lr", "inf"], "--lr inf: expected a finite number"),
        (["--lr", "0"], "--lr 0.0: expected a positive number"),
        (["--temperature", "0"], "--temperature 0.0: expected a number from 0.01 to 1000"),
        (["--kl-chunk-tokens", "0"], "--kl-chunk-tokens 0: expected a positive number"),
        (["--seq-length", str(2**40)], "--seq-length 1099511627776: expected no more than"),
        (["--distributed-timeout-minutes", "43201"], "--distributed-timeout-minutes 43201"),
        (["--save", "a" * 256], "bytes, 255 between two slashes"),
        (["--train-data-path", "d", "a\nb"], "expected text without control characters"),
        (
            ["--train-iters", str(10**9)],
            "--train-iters 1000000000 times --global-batch-size 32: 32,000,000,000 samples",
        ),
        (
            ["--eval-iters", str(10**8), "--valid-data-path", "v"],
            "--eval-iters 100000000 times --global-batch-size 32: 3,200,000,000 samples",
        ),
    ],
)
def test_by_flag(argv, message):
    needed = [word for name in ("teacher", "load", "save") for word in (f"--{name}", "x")]
    with pytest.raises(UserError) as error:
        parse_recipe(Stage2Recipe, "", [*needed, "--train-data-path", "d", *argv])
    assert message in str(error.value)


def test_the_largest_run():
    fields = {"train_iters": MOST_SAMPLES, "global_batch_size": 1, "eval_iters": 2**31 - 1}
    assert Stage1Recipe(**NEEDED, **fields).train_iters == MOST_SAMPLES


def bomb():
    """Nine lines that stand for 10**9 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 9):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    return "\n".join([*lines, "teacher: *a8", "train_data_path: *a8"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), "'a1' holds keys or lists"),
        ("train_data_path: " + "[" * 100_000, "too deep"),
        ("teacher: " + "{a: " * 50_000, "too deep"),
        ("train_data_path: [" + "x, " * 100_000, "bytes; a recipe has at most"),
        ("[1, 2]", "expected keys and values"),
        ("[a]: 1", "expected keys that are words"),
        ("? [a, b]\n: 1", "expected keys that are words"),
        ("teacher: {x: 1}", "'teacher' holds keys or lists"),
        ("<<: {lr: 1}", "'<<' holds keys or lists"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("teacher: *nowhere", "not valid YAML"),
        ("'" + "k" * 900 + "': 1", "unknown key 'kkk"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    found = answer(Stage1Recipe, file, {})
    assert isinstance(found, UserError) and str(found).startswith(f"{file}: ")
    assert message in str(found), str(found)[:300]


def test_a_large_recipe_is_read(tmp_path):
    file = tmp_path / "run.yaml"
    prefixes = [f"data/part-{i:05d}" for i in range(5000)]
    file.write_text("train_data_path: [" + ", ".join(prefixes) + "]\n")
    assert file.stat().st_size < LARGEST_FILE
    found = answer(Stage1Recipe, file, NEEDED)
    assert found.train_data_path == prefixes
