"""The tool: a whole report, and one line of error for what it cannot use."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from megatron_attnedit.checkpoint.as_hf import check_students
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.report import to_json
from megatron_attnedit.evaluate.students import parse_student, stage_metrics
from megatron_attnedit.export import loading
from tests.support.hf_students import DIMS
from tools import evaluate

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "evaluate.py"


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, flags)])
    evaluate.main()


def flags(teacher_dir, text_file, output, *students):
    given = ["--teacher", teacher_dir, "--text", text_file, "--output", output]
    given += ["--seq-length", 64, "--max-windows", 4, "--prompts", 2]
    given += ["--generations", 3, "--recall-probes", 4]
    return [*given, *(part for text in students for part in ("--student", text))]


def with_metrics(source: Path, folder: Path, stage: int) -> Path:
    shutil.copytree(source, folder)
    lines = [
        {"iteration": i, "stage": stage, "seconds": 2.0 * i, "tokens": 512 * i, key: 1 / i}
        for i in (1, 2, 3)
        for key in ("loss", "validation_loss")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def made(teacher_dir, gate_swa_dir, mla_dir, text_file, tmp_path, monkeypatch, capsys):
    stages = [with_metrics(gate_swa_dir, tmp_path / f"stage{i}", i) for i in (1, 2)]
    swa = f"name=swa,after_edit={teacher_dir},after_stage1={stages[0]},after_stage2={stages[1]}"
    mla = f"name=<mla>,after_edit={mla_dir}"
    extra = tmp_path / "extra" / "copy.json"
    out = tmp_path / "out"
    run(monkeypatch, *flags(teacher_dir, text_file, out, swa, mla), "--json", extra)
    assert extra.read_text() == (out / "report.json").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    report = json.loads(extra.read_text())
    return report, (out / "report.html").read_text(), capsys.readouterr().out


def test_report(made, teacher_dir):
    report, _, _ = made
    teacher, swa, mla = report["teacher"], *report["students"].values()
    assert teacher["name"] == teacher_dir.name
    assert list(swa["perplexity"]) == ["after_edit", "after_stage1", "after_stage2"]
    assert swa["perplexity"]["after_edit"] == teacher["perplexity"]
    assert swa["perplexity"]["after_stage1"] == swa["perplexity"]["after_stage2"]
    assert swa["kl_after_edit"] == 0 and swa["kl"] > 0.1
    assert swa["relative_error_after_edit"] == [0, 0, 0]
    assert len(swa["relative_error"]) == 3 and min(swa["relative_error"]) > 0
    ratio = swa["perplexity"]["after_stage2"] / teacher["perplexity"]
    assert swa["perplexity_ratio"] == pytest.approx(ratio)
    fraction = swa["kv_bytes_per_token"] / teacher["kv_bytes_per_token"]
    assert swa["kv_fraction"] == pytest.approx(fraction) and fraction < 0.5
    assert swa["seconds"] == {"stage1": 6.0, "stage2": 6.0}
    assert mla["kl"] == mla["kl_after_edit"] and mla["seconds"] == {}
    assert report["data"] == {"file": "text.jsonl", "windows": 4, "seq_length": 64, "tokens": 256}
    assert list(report["continuations"][0]["texts"]) == ["teacher", "swa", "<mla>"]
    assert teacher["generation"]["prompts"] == 3 and teacher["generation"]["identical"] == 1
    assert swa["generation"]["equal_tokens"] < 0.5
    assert swa["recall"]["nll"] != teacher["recall"]["nll"]
    assert swa["runs"] == {}
    assert report["versions"].keys() == {"megatron_attnedit", "torch", "transformers"}


def test_page_stands_alone(made):
    _, page, _ = made
    assert page.count("<svg") == 4
    assert "&lt;mla&gt;" in page and "<mla>" not in page
    loads = re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)|@import|<script', page)
    assert loads == []


def test_table_is_printed(made):
    report, _, out = made
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("model"))
    assert [line.split()[0] for line in lines[start : start + 4]] == [
        "model",
        "teacher",
        "swa",
        "<mla>",
    ]
    assert f"{report['students']['swa']['kl']:.4f}" in lines[start + 2]
    assert f"{report['students']['swa']['recall']['nll']:.3f}" in lines[start + 7]


def test_numbers_that_json_lacks_become_null():
    assert json.loads(to_json({"a": [float("inf"), float("nan"), 1.5]})) == {"a": [None, None, 1.5]}


def test_metrics_of_a_megatron_run_stand_above_its_iterations(gate_swa_dir, tmp_path):
    run_folder = with_metrics(gate_swa_dir, tmp_path / "run", 1)
    student = parse_student(f"name=a,after_stage1={run_folder / 'iter_0000003'}")
    assert stage_metrics(student)["stage1"][-1]["seconds"] == 6.0


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("name=a,after_stage3=x", "after_stage3"),
        ("name=a", "none of after_edit"),
        ("after_edit=x", "no name="),
        ("name=a,name=b,after_edit=x", "twice"),
        ("name=a,after_edit=", "after_edit="),
    ],
)
def test_bad_student_flags(student, message):
    with pytest.raises(UserError, match=message):
        parse_student(student)


@pytest.fixture
def refused(teacher_dir, text_file, tmp_path, monkeypatch):
    def attempt(message, student, *more, text=text_file):
        output = tmp_path / "out"
        with pytest.raises(UserError, match=message) as caught:
            run(monkeypatch, *flags(teacher_dir, text, output, student), *more)
        assert "\n" not in str(caught.value)
        assert not output.exists()

    return attempt


def test_directory_without_config(refused, tmp_path):
    message = f"--student name=a: after_edit {tmp_path}: neither config.json"
    refused(message, f"name=a,after_edit={tmp_path}")


def test_directory_without_weights(refused, teacher_dir, tmp_path):
    shutil.copy(teacher_dir / "config.json", tmp_path)
    refused(f"{tmp_path}: cannot be loaded", f"name=a,after_edit={tmp_path}")


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*_):
        raise AssertionError("loaded before everything was looked at")

    monkeypatch.setattr(loading, "load_tokenizer", load)
    monkeypatch.setattr(loading, "load_model", load)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_students_are_looked_at_before_anything_is_loaded(refused, teacher_dir, tmp_path):
    student = f"name=a,after_edit={teacher_dir}"
    refused("--student name=a: given twice", student, "--student", student)
    refused("--student name=teacher: that is the teacher's", student.replace("=a,", "=teacher,"))
    for name in ("none", "none.safetensors"):
        missing = f"{student},after_stage2={tmp_path / name}"
        refused(f"--student name=a: after_stage2 {tmp_path / name}: ", missing)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_outputs_are_looked_at_before_anything_is_loaded(refused, teacher_dir, tmp_path):
    student, file = f"name=a,after_edit={teacher_dir}", tmp_path / "file"
    file.write_text("")
    for path in (file, file / "out"):
        refused(f"--output {path}: {file} is not a folder", student, "--output", path)
    refused(f"--json {file}: {file} is not a folder", student, "--json", file / "a.json")
    refused(f"--json {tmp_path}: is a folder", student, "--json", tmp_path)


def test_students_of_any_kind_of_checkpoint_pass(teacher_dir, tmp_path):
    iteration, edited = tmp_path / "iter_0000003", tmp_path / "edited.safetensors"
    iteration.mkdir()
    (iteration / "attnedit.json").write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    edited.write_bytes(b"")
    kinds = (teacher_dir, iteration, tmp_path, edited)
    check_students([parse_student(f"name={i},after_edit={kind}") for i, kind in enumerate(kinds)])


@pytest.mark.parametrize("content", ["", '{"text": ""}\n', '{"text": "w1 w2"}\n'])
def test_text_shorter_than_a_window(refused, teacher_dir, tmp_path, content):
    file = tmp_path / "short.jsonl"
    file.write_text(content)
    refused("--text .*short.jsonl", f"name=a,after_edit={teacher_dir}", text=file)


def test_missing_text_and_unknown_kind(refused, teacher_dir, tmp_path):
    student = f"name=a,after_edit={teacher_dir}"
    refused("--text .*none.jsonl: no such file", student, text=tmp_path / "none.jsonl")
    (tmp_path / "a.pdf").write_text("x")
    refused("--text .*a.pdf: unknown extension", student, text=tmp_path / "a.pdf")


def test_a_text_that_is_cut_off_or_no_lines(refused, teacher_dir, text_file, tmp_path):
    student, content = f"name=a,after_edit={teacher_dir}", text_file.read_bytes()
    for pack in (gzip.compress, zstandard.compress):
        file = tmp_path / f"Text.JSONL.{'GZ' if pack is gzip.compress else 'ZST'}"
        file.write_bytes(pack(content)[:-2])
        refused(f"{file}: cannot be read", student, text=file)
    rows = [json.loads(line) for line in content.splitlines()]
    cases = {json.dumps(rows): "not a JSON array", '{"text": "\\ud800"}': "surrogate"}
    for bad, message in cases.items():
        (tmp_path / "bad.json").write_text(bad)
        refused(f"bad.json:1: .*{message}", student, text=tmp_path / "bad.json")


def test_weights_that_are_no_weights(refused, teacher_dir, tmp_path):
    """Whatever transformers raises is one line."""
    student = tmp_path / "student"
    shutil.copytree(teacher_dir, student)
    whole = json.loads((student / "config.json").read_text())
    for field, value in {"num_attention_heads": 0, "hidden_size": "x", "layer_types": 3}.items():
        (student / "config.json").write_text(json.dumps({**whole, field: value}))
        refused(f"{student}: ", f"name=a,after_edit={student}")
    (student / "config.json").write_text(json.dumps(whole))
    (student / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(f"{student}: cannot be loaded", f"name=a,after_edit={student}")


def test_windows_longer_than_the_model(refused, teacher_dir):
    student = f"name=a,after_edit={teacher_dir}"
    file = teacher_dir / "config.json"
    message = f"--seq-length 129 is longer than max_position_embeddings 128 of {file}"
    refused(message, student, "--seq-length", 129, "--max-windows", 1)


def test_a_student_of_another_build(refused, tmp_path):
    shape = {"vocab_size": DIMS["vocab_size"], "n_embd": 8, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path)
    refused(f"{tmp_path}: GPT2LMHeadModel is no decoder", f"name=a,after_edit={tmp_path}")


@pytest.mark.parametrize("line", [b"[1]", b"\xff", b"{", b"[" * 100_000, b"5"])
def test_metrics_that_are_none(gate_swa_dir, tmp_path, line):
    run_folder = with_metrics(gate_swa_dir, tmp_path / "run", 1)
    with (run_folder / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match="metrics.jsonl: "):
        stage_metrics(parse_student(f"name=a,after_stage1={run_folder}"))


def test_other_vocabulary_size(refused, tmp_path):
    folder = tmp_path / "wider"
    Qwen3ForCausalLM(Qwen3Config(**{**DIMS, "vocab_size": 70})).save_pretrained(folder)
    refused("vocab_size 70", f"name=a,after_edit={folder}")


def test_other_tokenizer(refused, teacher_dir, tmp_path):
    folder = tmp_path / "renamed"
    shutil.copytree(teacher_dir, folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w7"', '"other"'))
    refused("tokenizer's vocabulary", f"name=a,after_edit={folder}")


def test_other_number_of_layers(refused, tmp_path):
    folder = tmp_path / "deeper"
    Qwen3ForCausalLM(Qwen3Config(**{**DIMS, "num_hidden_layers": 4})).save_pretrained(folder)
    refused("4 layers", f"name=a,after_edit={folder}")


def test_probes_do_not_fit_short_windows(refused, teacher_dir):
    student = f"name=a,after_edit={teacher_dir}"
    refused("--seq-length 20: --recall-probes needs 48", student, "--seq-length", 20)


def test_windows_beyond_the_teachers_positions(refused, teacher_dir):
    longest = DIMS["max_position_embeddings"]
    words = f"--seq-length {longest + 1} is longer than max_position_embeddings {longest} of "
    refused(words, f"name=a,after_edit={teacher_dir}", "--seq-length", longest + 1)


@pytest.mark.parametrize("flag", ["--max-windows", "--batch-size", "--seq-length"])
def test_numbers_out_of_range(refused, teacher_dir, flag):
    refused(f"{flag} 0", f"name=a,after_edit={teacher_dir}", flag, 0)


def test_the_tool_says_one_line_and_exits_2(teacher_dir, text_file, tmp_path):
    student = f"name=a,after_edit={tmp_path / 'none'}"
    command = [sys.executable, TOOL, *flags(teacher_dir, text_file, tmp_path / "out", student)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    message = f"error: --student name=a: after_edit {tmp_path / 'none'}: neither config.json"
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
