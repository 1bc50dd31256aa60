"""examples/serve.sh: with a stand-in for vLLM, and, in the full run, with vLLM for the CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.stand_in_vllm import REFUSAL

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vllm(tmp_path):
    """A Python whose vLLM is the stand-in."""
    program = tmp_path / "python"
    stand_in = Path(__file__).with_name("stand_in_vllm.py")
    chosen = f'if [ "$1" = -m ]; then exec {sys.executable} {stand_in} "$@"; fi'
    program.write_text(f'#!/bin/sh\n{chosen}\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def directory(tmp_path):
    def make(kind):
        folder = tmp_path / kind
        folder.mkdir()
        config = {"stand_in": kind, "max_position_embeddings": 512}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def start(vllm, *words):
    environment = {**os.environ, "ATTNEDIT_SERVE_PYTHON": str(vllm)}
    return subprocess.Popen(
        ["bash", "examples/serve.sh", *map(str, words)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(vllm, *words):
    process = start(vllm, *words)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def seen(folder):
    """What the stand-in was started with, as soon as it was."""
    deadline = time.monotonic() + 30
    while not (folder / "seen.json").is_file() or not (folder / "seen.json").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return json.loads((folder / "seen.json").read_text())


def alive(pid):
    """Does it run? What has ended and was not waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_it_asks_and_stops_everything(vllm, directory):
    folder = directory("answers")
    code, out, err = run(
        vllm, folder, "--prompt", 'say "it\'s"', "--max-tokens", 7, "--", "--seed", 3
    )
    assert (code, err) == (0, "")
    assert "answer: answers 'say \"it\\'s\"'" in out
    assert "7 tokens in " in out and " tokens/s" in out
    assert not Path(out.partition("log: ")[2].partition("\n")[0]).exists()
    held = "1,073,741,824 bytes hold 43,690 tokens in requests of 512, 24,576 bytes each"
    assert f"cache: {held}" in out
    flags = seen(folder)["flags"]
    assert flags[flags.index("--host") + 1] == "127.0.0.1" and flags[-2:] == ["--seed", "3"]
    assert flags[flags.index("--max-model-len") + 1] == "512"
    assert "--max-num-batched-tokens" not in flags
    assert not any(map(alive, seen(folder)["pids"]))


def test_sliding_layers_read_prompts_in_small_parts(vllm, directory):
    folder = directory("answers")
    config = {"stand_in": "answers", "layer_types": ["full_attention", "sliding_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert run(vllm, folder)[0] == 0
    flags = seen(folder)["flags"]
    assert flags[flags.index("--max-num-batched-tokens") + 1] in ("256", "2048")


def test_a_server_that_does_not_stop_is_killed_without_a_word(vllm, directory):
    folder = directory("stays")
    code, out, err = run(vllm, folder)
    assert (code, err) == (0, "") and "answer: " in out
    assert not any(map(alive, seen(folder)["pids"]))


@pytest.mark.parametrize("kind", ["refuses", "dies"])
def test_an_engine_that_refuses(vllm, directory, kind):
    """While it loads, or at the first request."""
    folder = directory(kind)
    code, out, err = run(vllm, folder)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: {folder}: vLLM refuses it: {REFUSAL} (log: ")
    assert not any(map(alive, seen(folder)["pids"]))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_it_loads(vllm, directory, sent, code):
    folder = directory("waits")
    process = start(vllm, folder)
    pids = seen(folder)["pids"]
    assert all(map(alive, pids))
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert not any(map(alive, pids))


def test_bad_input_is_one_line(vllm, directory, tmp_path):
    folder, empty, broken = directory("answers"), tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        cases = {
            (): "name a directory; see --help",
            (tmp_path / "no",): f"{tmp_path}/no: no such directory",
            (empty,): f"{empty}: no config.json there",
            (broken,): f"{broken}/config.json: not a model's configuration",
            (folder, "--port", port): f"--port {port}: Address already in use",
            (folder, "--port", 70000): "--port 70000: ",
            (folder, "--port", "x"): "--port x: expected a positive whole number",
            (folder, "--port"): "--port: needs a value",
            (folder, "--max-tokens", 0): "--max-tokens 0: expected a positive whole number",
            (folder, "--ports", 1): "unknown argument --ports; see --help",
            (folder, empty): f"{empty}: one directory, not two; see --help",
        }
        for words, message in cases.items():
            code, out, err = run(vllm, *words)
            assert code == 2 and err.startswith(f"error: {message}"), (words, err)
            assert err.count("\n") == 1, err
    assert not (folder / "seen.json").exists()


@pytest.mark.full
def test_with_vllm(tmp_path):
    """The embedded teacher's students as an edit leaves them: an answer, and a refusal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_attnedit.training.edit import EditConfig, edit
    from tests.support.conversions import make

    teacher = ROOT / "examples/embedded_teacher/model"
    for name, flags in (("gate_swa", {}), ("mla", {"kv_lora_rank": 156})):
        edit(EditConfig(
            teacher=str(teacher), save=str(tmp_path / name), student_attention=name, flags=flags,
            init="random", seed=3, calibration_data_path=[], calibration_tokens=0, seq_length=64,
        ))  # fmt: skip
        make(tmp_path / name, tmp_path / f"{name}_hf", "hf", dtype="float32")

    def serve(folder):
        words = ["bash", "examples/serve.sh", folder, "--max-tokens", "16"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        found = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        return found.returncode, found.stdout, found.stderr

    code, out, err = serve(tmp_path / "gate_swa_hf")
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gate_swa_hf", trust_remote_code=True)
    ids = tokenizer("The most important thing about", return_tensors="pt")["input_ids"]
    own = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    answer = out.partition("answer: ")[2].partition("\n16 tokens in")[0]
    assert answer == tokenizer.decode(own).strip()
    assert " tokens/s" in out and " bytes each" in out

    code, out, err = serve(tmp_path / "mla_hf")
    assert code == 2
    line, *others = (line for line in err.splitlines() if not line.startswith("[venv]"))
    assert not others, err
    assert "vLLM refuses it: " in line and "not supported by MLA" in line
