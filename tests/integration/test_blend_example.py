"""The SmolLM2 example's comparison of text with a blend, and the program that runs its steps."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tools.benchmark.published import read_report
from tools.benchmark.tables import filled

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "smollm2_135m"
EMBEDDED = ROOT / "examples" / "embedded_teacher"


def run_steps(lines, folder, *flags, **options):
    command = [sys.executable, str(EXAMPLE / "steps.py"), "--logs", str(folder / "logs"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options}
    text = "".join(line + "\n" for line in lines)
    return subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, check=False
    )


def test_steps_run_side_by_side_in_their_order(tmp_path):
    """Two wait for each other, so they run together; one fails, and what needs it does not run."""
    here = str(tmp_path)
    meet = "touch {0}; for i in $(seq 200); do [ -e {1} ] && exit 0; sleep 0.05; done; exit 1"
    done = run_steps(
        [
            f"a\ttrain\t-\tcd {here}; " + meet.format("a", "b"),
            f"b\ttrain\tdone before\tcd {here}; " + meet.format("b", "a"),
            f"c\ttrain\ta,b\tcd {here}; [ -e a ] && [ -e b ] && touch c",
            "d\ttrain\t-\techo no room >&2; exit 3",
            f"e\treport\tc,d\ttouch {here}/e",
        ],
        *(tmp_path, "--at-a-time", "2"),
    )
    assert done.returncode == 2 and "error: not done: d, e; see" in done.stderr
    assert (tmp_path / "c").exists() and not (tmp_path / "e").exists()
    assert (tmp_path / "logs" / "d.log").read_text() == "no room\n"
    assert "d: ended with 3" in done.stdout
    assert "expected name, kind, needs and command" in run_steps(["a\tb"], tmp_path).stderr
    twisted = run_steps(["a\tx\tb\ttrue", "b\tx\t-\ttrue"], tmp_path)
    assert "a: comes before b" in twisted.stderr


def test_when_the_time_is_over_nothing_is_left(tmp_path):
    mark = tmp_path / "pid"
    inner = f"sh -c 'echo $$ >{mark}; sleep 60'"
    done = run_steps([f"a\tx\t-\t{inner}; true", "b\tx\ta\ttrue"], tmp_path, "--seconds", "1")
    assert done.returncode == 2 and "not done: a, b" in done.stderr
    end = time.monotonic() + 10
    while Path(f"/proc/{mark.read_text().strip()}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


# Turns of one line; a text of this teacher ends soon if these words end it, too.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ENDS = (".", ",", "\n", " the", " a", " is", " of", " to")
SHORT = "--no-bf16 --seq-length 256 --micro-batch-size 2 --global-batch-size 2 --lr-warmup-iters 0"
SHORT += " --eval-iters 1 --log-interval 1"
FEW = "--seq-length 256 --max-windows 4 --generations 4 --recall-probes 4 --prompts 0"
FEW += " --generated-tasks needle,choice --task-lengths 256 --task-samples 2"


def small_work(folder):
    """What prepare.sh makes, of the embedded teacher."""
    teacher = folder / "teacher"
    shutil.copytree(EMBEDDED / "model", teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(teacher)
    ends = [tokenizer.eos_token_id, *(tokenizer.encode(text)[-1] for text in ENDS)]
    file = teacher / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
    (folder / "corpus").mkdir()
    for name, source in (("train", "stage1"), ("validation", "validation"), ("heldout", "heldout")):
        text = gzip.decompress((EMBEDDED / "text" / f"{source}.jsonl.gz").read_bytes())
        rows = text.splitlines(keepends=True)[:60]
        (folder / "corpus" / f"{name}.jsonl").write_bytes(b"".join(rows))
    for name in ("train", "validation"):
        command = [ROOT / "tools" / "preprocess_data.py", "--tokenizer", teacher, "--input"]
        command += [folder / "corpus" / f"{name}.jsonl", "--output", folder / "data" / name]
        command = [sys.executable, *map(str, command)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.full
def test_from_prompts_to_tables(tmp_path):
    """Answers, both arms of both attentions, judgement by tasks and generation, and the tables."""
    small_work(tmp_path)
    answers = "--prompts 12 --generate --batch-size=8 --generate --max-new-tokens=32"
    command = ["bash", EXAMPLE / "blend.sh", "--work", tmp_path, "--iterations", 4, "--list"]
    command += ["--seeds", "3", "--stage", SHORT, "--evaluate", FEW, "--answers", answers]
    command += ["--edit", "--seq-length 256 --calibration-tokens 1024"]

    def listed():
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    steps = listed()
    names = [line.split("\t")[0] for line in steps]
    students = [f"{attention}_{kind}_3" for kind in ("plain", "blend") for attention in ATTENTIONS]
    assert names == [
        *("answers_validation", "answers"),
        *(f"{attention}_3" for attention in ATTENTIONS),
        *students,
        *(f"report_{attention}_3" for attention in ATTENTIONS),
    ]
    done = run_steps(steps, tmp_path, "--at-a-time", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert listed() == []  # all of it is done
    rows = [json.loads(line) for line in (tmp_path / "answers" / "data.jsonl").open()]
    assert rows and all(row["messages"][-1]["role"] == "assistant" for row in rows)
    answered = json.loads((tmp_path / "data" / "answers.json").read_text())
    assert 0 < answered["counted_tokens"] < answered["tokens"]
    data = tmp_path / "kept" / "blend.json"
    reports = sorted((tmp_path / "report_blend").glob("*/report.json"))
    add = [sys.executable, "-m", "tools.benchmark.results", "add", *map(str, reports)]
    add += ["--data", str(data)]
    subprocess.run(add, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    kept = read_report(data)["students"]
    assert sorted(kept) == sorted(students)
    for student in kept.values():
        assert student["runs"]["stage1"]["train_iters"] == 1
        assert student["runs"]["stage2"]["train_iters"] == 3
        assert [record["task"] for record in student["tasks"]] == ["needle", "choice"]
    end = "<!-- end of table -->"
    page = filled(
        "".join(f"<!-- table: {kind} blend.json -->\n{end}\n" for kind in ("judged", "tasks")),
        data.parent,
    )
    for name in students:
        assert page.count(f"| {name} |") == 2
    longer(tmp_path, "mla_plain_3")


def longer(folder, of):
    """The longer last phase of one of them, each sample on two processes."""
    stage = SHORT.replace("256", "512") + " --train-iters 2"
    judged = FEW.replace("256", "512").replace("--generations 4", "--generations 0")
    judged = judged.replace("needle,choice --task-lengths 512", "needle --task-lengths 256,512")
    command = ["bash", EXAMPLE / "long.sh", "--work", folder, "--of", of, "--processes", "2"]
    command += ["--stage", stage, "--evaluate", judged, "mla"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / f"{of}_8k" / "report" / "report.json").read_text())
    entries = {"teacher": report["teacher"], **report["students"]}
    assert list(entries) == ["teacher", of, f"{of}_8k"]
    for entry in entries.values():
        assert [record["length"] for record in entry["tasks"]] == [256, 512]
    run = entries[f"{of}_8k"]["runs"]["stage2"]
    assert (run["seq_length"], run["context_parallel_size"], run["train_iters"]) == (512, 2, 2)


ATTENTIONS = ("mla", "gate_swa")
