"""Tasks through the tool: the report, a server, the harness, and one line for what is not there."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_attnedit.errors import UserError
from megatron_attnedit.export import loading
from tests.support.stand_in_server import serving
from tools import evaluate

ROOT = Path(__file__).parents[3]
EMBEDDED = ROOT / "examples" / "embedded_teacher"
TEACHER = EMBEDDED / "model"
TASKS = ROOT / "examples" / "tasks"
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs lm-eval, which the extra eval brings (250 MB with what it needs)",
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    def attempt(*more, students=("same",)):
        flags = ["--teacher", TEACHER, "--text", EMBEDDED / "text" / "heldout.jsonl.gz"]
        flags += ["--seq-length", 64, "--max-windows", 1, "--prompts", 0, "--generations", 0]
        flags += ["--recall-probes", 0, "--output", tmp_path / "out"]
        for name in students:
            flags += ["--student", f"name={name},after_edit={TEACHER}"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, [*flags, *more])])
        evaluate.main()
        return json.loads((tmp_path / "out" / "report.json").read_text())

    return attempt


@pytest.fixture(scope="module")
def server():
    model = loading.load_model(TEACHER, torch.float32, torch.device("cpu"))
    with serving(model, loading.load_tokenizer(TEACHER)) as (url, served):
        yield url, served


def scores(entry):
    return {(t["task"], t["metric"]): (t["score"], t["stderr"], t["n"]) for t in entry["tasks"]}


GENERATED = ("--generated-tasks", "needle,choice", "--task-samples", 2)


def test_generated_tasks_here_and_through_a_server(run, server, tmp_path, capsys):
    url, served = server
    lengths = ("--task-lengths", "320,256")
    report = run(*GENERATED, *lengths, "--task-seed", 5, "--server", url)
    teacher, student = report["teacher"], report["students"]["same"]
    assert scores(teacher) == scores(student) and len(served) == 3
    assert {(t["task"], t["length"]) for t in teacher["tasks"]} == {
        ("needle", 256), ("needle", 320), ("choice", None)
    }  # fmt: skip
    assert [teacher["tasks_through"], student["tasks_through"]] == ["transformers", "server"]
    for task in student["tasks"]:
        assert (task["ties"], task["difference"], task["difference_stderr"]) == (1, 0, 0)
    assert all("wins" not in task for task in teacher["tasks"])
    assert report["tasks"]["seed"] == 5 and report["tasks"]["lengths"] == [256, 320]
    letters = teacher["tasks"][-1]["letters"]
    assert sum(rate["rate"] for rate in letters.values()) == pytest.approx(1)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Letters chosen in multiple choice" in page and "<figcaption>needle<" in page
    chosen = teacher["tasks"][-1]
    shown = f"{100 * chosen['score']:.1f} \u00b1 {100 * chosen['stderr']:.1f}"
    assert shown in page and shown in capsys.readouterr().out


@needs_harness
def test_tasks_of_the_harness_here_and_through_a_server(run, server):
    asked = ("--tasks", "kinds,sums", "--tasks-path", TASKS, "--limit", 12)
    report = run(*asked, "--server", server[0])
    teacher, student = scores(report["teacher"]), scores(report["students"]["same"])
    assert teacher.keys() == {
        ("kinds", "acc"), ("kinds", "acc_norm"), ("sums", "exact_match (number)")
    }  # fmt: skip
    assert teacher == student
    score, stderr, n = teacher["kinds", "acc"]
    assert n == 12 and stderr == pytest.approx((score * (1 - score) / 11) ** 0.5)
    assert report["tasks"]["limit"] == 12
    entries = report["students"]["same"]["tasks"]
    assert {(t["difference"], t["ties"], t["is_share"]) for t in entries} == {(0, 1, True)}


@needs_harness
def test_a_group_has_the_items_of_its_tasks(run, tmp_path):
    for name in ("kinds.yaml", "kinds.jsonl"):
        (tmp_path / name).write_text((TASKS / name).read_text())
    other = (TASKS / "kinds.yaml").read_text().replace("task: kinds", "task: kinds_too")
    (tmp_path / "too.yaml").write_text(other)
    group = "group: both\ntask: [kinds, kinds_too]\naggregate_metric_list:\n"
    group += "  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    (tmp_path / "both.yaml").write_text(group)
    report = run("--tasks", "both", "--tasks-path", tmp_path, "--limit", 5)
    (both,) = [t for t in report["students"]["same"]["tasks"] if t["task"] == "both"]
    assert (both["metric"], both["n"], both["ties"], both["difference_stderr"]) == ("acc", 10, 1, 0)
    assert both["is_share"] and 0 < both["score"] < 1


@pytest.fixture
def refused(run, tmp_path):
    def attempt(message, *more, **students):
        with pytest.raises(UserError, match=message) as caught:
            run(*more, **students)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    return attempt


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*_):
        raise AssertionError("loaded before everything was looked at")

    monkeypatch.setattr(loading, "load_model", load)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_flags_that_make_no_tasks(refused):
    for message, flags in {
        "--generated-tasks x: expected all": ("--generated-tasks", "x"),
        "--task-lengths 512: needs --generated-tasks": ("--task-lengths", "512"),
        "--task-lengths 5,x: expected positive": (*GENERATED, "--task-lengths", "5,x"),
        "--task-samples 0: must be at least 1": ("--task-samples", "0"),
        "--limit 0: must be at least 1": ("--limit", "0"),
        "--limit 3: needs --tasks": ("--limit", "3"),
        "--tasks-path x: needs --tasks": ("--tasks-path", "x"),
        "--server: needs --tasks": ("--server", "http://127.0.0.1:1"),
        "--apply-chat-template: needs --tasks": ("--apply-chat-template",),
        "other is none of teacher, same": (*GENERATED, "--server", "other=http://127.0.0.1:1"),
        "--server a:1: expected http": (*GENERATED, "--server", "a:1"),
        "the teacher's tokenizer has no chat": (*GENERATED, "--apply-chat-template"),
        "same is given twice": (*GENERATED, *(2 * ("--server", "same=http://127.0.0.1:1"))),
    }.items():
        refused(message, *flags)
    url = "http://127.0.0.1:1"
    refused(f"--server {url}: of which model", *GENERATED, "--server", url, students="ab")
    refused(f"--server {url}/v1/models: no answer: ", *GENERATED, "--server", url)  # none is there


def test_lengths_that_fit_nothing(refused):
    refused("--task-lengths 4096: the models take 2048", *GENERATED, "--task-lengths", 4096)
    refused("a prompt of 16 tokens is too short", *GENERATED, "--task-lengths", 40)


@needs_harness
@pytest.mark.usefixtures("nothing_is_loaded")
def test_tasks_that_are_not_there(refused, tmp_path):
    refused(
        "--tasks-path .*none: no such folder", "--tasks", "a", "--tasks-path", tmp_path / "none"
    )
    refused("--tasks never_heard_of: no such task in", "--tasks", "never_heard_of")
    (tmp_path / "a.yaml").write_text((TASKS / "sums.yaml").read_text())
    refused("--tasks sums: cannot be loaded: ", "--tasks", "sums", "--tasks-path", tmp_path)
    refused("--tasks arc_easy: cannot be loaded: ", "--tasks", "arc_easy")


def test_without_the_harness(refused, monkeypatch):
    monkeypatch.setattr("megatron_attnedit.evaluate.tasks.harness.PACKAGE", "not-installed")
    refused("--tasks: lm-eval is not installed", "--tasks", "kinds", "--tasks-path", TASKS)
