"""Students in a running vLLM server: judged, and asked for text, as through transformers.

Needs what ``test_vllm.py`` needs.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_attnedit.training.edit import EditConfig, edit
from tests.integration.test_blend_example import small_work
from tests.serving.test_vllm import VLLM, plug_in
from tests.support.conversions import make
from tools import evaluate, generate_data

__all__ = ["plug_in"]
ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "tasks"
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not VLLM.is_file(), reason=f"no vLLM at {VLLM}: run examples/serve.sh"),
]
START_S = 900
WITHIN = 0.002  # of a score: 0.2 points
STUDENTS = {
    # As many numbers as the teacher keeps, so that it answers as the teacher does.
    "mla": ({"kv_lora_rank": 448, "qk_pos_emb_head_dim": 64}, {"pad_for_serving": 576}),
    "gate_swa": ({"sliding_window": 128}, {}),
}


@pytest.fixture(scope="module", params=STUDENTS)
def student(request, tmp_path_factory):
    """Folder of teacher and text; the student's checkpoint; what is served of it."""
    folder = tmp_path_factory.mktemp("work")
    small_work(folder)
    flags, export = STUDENTS[request.param]
    edit(
        EditConfig(
            teacher=str(folder / "teacher"), save=str(folder / "edit"),
            student_attention=request.param, flags=flags, init="teacher", seed=1,
            calibration_data_path=[str(folder / "data" / "train")], calibration_tokens=4096,
            seq_length=512,
        )
    )  # fmt: skip
    return folder, folder / "edit", make(folder / "edit", folder / "hf", "hf", **export)


@pytest.fixture(scope="module")
def server(student, plug_in, tmp_path_factory):
    """The address of vLLM with the student, as examples/serve.sh starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("server") / "log"
    python = VLLM.with_name("python")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(plug_in), "ATTNEDIT_SERVE_PYTHON": str(python)}
    environment |= {"VLLM_PLUGINS": "megatron_attnedit"}
    command = ["bash", ROOT / "examples" / "serve.sh", student[2], "--port", port, "--keep", "--"]
    command += ["--dtype", "float32", "--max-num-seqs", 8]
    with log.open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment)
    try:
        end = time.monotonic() + START_S
        while "Serving on" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def call(tool, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tool", *map(str, flags)])
        tool.main()


def test_it_is_judged_alike(student, server, tmp_path):
    """Through transformers, from the Megatron checkpoint, and through the server."""
    folder, checkpoint, exported = student
    asked = ["--generated-tasks", "needle,choice,copy", "--task-samples", 6]
    asked += ["--task-lengths", "256,512"]
    if importlib.util.find_spec("lm_eval") is not None:
        asked += ["--tasks", "kinds,sums", "--tasks-path", TASKS, "--limit", 24]
    found = {}
    ways = {"transformers": (exported, []), "megatron": (checkpoint, [])}
    ways["vllm"] = (exported, ["--server", f"student={server}"])
    for way, (directory, more) in ways.items():
        flags = ["--teacher", folder / "teacher", "--text", folder / "corpus" / "heldout.jsonl"]
        flags += ["--seq-length", 256, "--max-windows", 1, "--prompts", 0, "--generations", 0]
        flags += ["--recall-probes", 0, "--student", f"name=student,after_edit={directory}"]
        call(evaluate, *flags, "--output", tmp_path / way, *asked, *more)
        report = json.loads((tmp_path / way / "report.json").read_text())
        entry = report["students"]["student"]
        found[way] = {(t["task"], t["metric"], t["length"]): t["score"] for t in entry["tasks"]}
        assert entry["tasks_through"] == ("server" if way == "vllm" else "transformers")
    print(found)
    for way in ("megatron", "vllm"):
        assert found[way] == pytest.approx(found["transformers"], abs=WITHIN), way


def test_it_writes_alike(student, server, tmp_path):
    """Greedy answers, token by token; and drawn ones, stopped, resumed and each once."""
    folder, _, exported = student
    prompts = tmp_path / "prompts.jsonl"
    text = (folder / "corpus" / "heldout.jsonl").read_text().splitlines()
    rows = [{"messages": [{"role": "user", "content": json.loads(t)["text"][:200]}]} for t in text]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    greedy = ["--prompts", prompts, "--temperature", 0, "--max-new-tokens", 48]
    models = {"here": ["--model", exported], "there": ["--server", server]}
    written = {}
    for name, model in models.items():
        call(generate_data, *greedy, "--output", tmp_path / name, *model)
        lines = (tmp_path / name / "data.jsonl").read_text().splitlines()
        written[name] = {
            row["id"]: row["messages"][-1]["content"].strip() for row in map(json.loads, lines)
        }
    assert len(written["here"]) >= 6 and written["there"] == written["here"]
    drawn = ["--prompts", prompts, "--output", tmp_path / "drawn", "--server", server]
    drawn += ["--samples", 2, "--max-new-tokens", 48, "--top-p", 0.9]
    call(generate_data, *drawn, "--limit", 3)
    first = (tmp_path / "drawn" / "data.jsonl").read_text()
    call(generate_data, *drawn)
    rows = (tmp_path / "drawn" / "data.jsonl").read_text()
    assert rows.startswith(first) and first
    found = [(row["id"], row["sample"]) for row in map(json.loads, rows.splitlines())]
    assert len(set(found)) == len(found) > 6
    assert "through: server" in (tmp_path / "drawn" / "README.md").read_text()
