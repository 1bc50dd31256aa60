"""A real run under a real SLURM, preempted twice, beside one that was not."""

import subprocess
from pathlib import Path

import pytest

from megatron_attnedit.checkpoint.run_folder import latest
from tests.support.attempts import contents, differences
from tests.support.launching import (
    ENVIRONMENT,
    ROOT,
    bash,
)
from tests.support.slurm_jobs import (
    MARKS,
    TEACHER,
    logged,
    of_training,
)

pytestmark = MARKS


@pytest.fixture(scope="module")
def teacher_and_student(tmp_path_factory) -> Path:
    """Data of the embedded teacher's text, and an untrained student of it."""
    folder = tmp_path_factory.mktemp("embedded")
    steps = [
        [
            "preprocess_data",
            "--input",
            "examples/embedded_teacher/text/stage1.jsonl.gz",
            "--tokenizer",
            TEACHER,
            "--output",
            folder / "data",
        ],
        [
            "edit_checkpoint",
            "--teacher",
            TEACHER,
            "--save",
            folder / "edit",
            "--init",
            "random",
            "--student-attention",
            "mla",
            "--kv-lora-rank",
            156,
            "--qk-pos-emb-head-dim",
            48,
        ],
    ]
    for name, *words in steps:
        answer = subprocess.run(
            ["python", f"tools/{name}.py", *map(str, words)],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_real_run_is_preempted_twice(submit, teacher_and_student, tmp_path, stage):
    """Its weights, losses and optimizer are those of a run that nobody touched, bit for bit."""
    folder, last = teacher_and_student, 24
    (tmp_path / "recipe.yaml").write_text(
        f"seq_length: 256\nglobal_batch_size: 4\ntrain_iters: {last}\nlog_interval: 1\n"
        "lr_warmup_iters: 4\nuse_distributed_optimizer: true\n"
    )
    words = [
        stage,
        tmp_path / "recipe.yaml",
        "--teacher",
        TEACHER,
        "--load",
        folder / "edit",
        "--train-data-path",
        folder / "data",
    ]
    variables = {"ATTNEDIT_LOGS": str(tmp_path / "logs")}
    untouched = bash(
        ROOT, "examples/torchrun/train.sh", *words, "--save", tmp_path / "untouched", **variables
    )
    output, _ = untouched.communicate(timeout=300)
    assert untouched.returncode == 0, output

    save, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(*words, "--save", save, root=ROOT, options=["--output", log], **variables)
    for iteration in (4, 12):
        job.wait(lambda least=iteration: logged(save) >= least, 120)
        job.preempt(1)
        job.wait(lambda: job.state() != "RUNNING", 60)
        job.wait_for_state("RUNNING")
    job.wait_for_state("COMPLETED")
    assert log.read_text().count("saved: queued again") == 2
    assert [entry["iteration"] for entry in of_training(save)] == list(range(1, last + 1))
    for one, other in zip(of_training(save), of_training(tmp_path / "untouched"), strict=True):
        for name in ("loss", "lr", "grad_norm"):
            assert one[name] == other[name], (one["iteration"], name)
    ends = [contents(latest(path)) for path in (save, tmp_path / "untouched")]
    assert differences(*ends) == []
