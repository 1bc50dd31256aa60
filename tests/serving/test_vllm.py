"""Exported students answer in vLLM what they answer in transformers, from a small cache.

Needs ``.venv-serve``, which ``examples/serve.sh`` makes, or ATTNEDIT_VLLM, its ``vllm``; trained
students are those of ``outputs/quickstart`` or ATTNEDIT_QUICKSTART.
"""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.export.hf import causal_lm_class
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.planning.serving import ServingSize, serve_student
from tests.support.conversions import make
from tests.support.inputs import make_student
from tests.support.models import VOCAB, tiny_data, tiny_hf_dir

ROOT = Path(__file__).parents[2]
VLLM = Path(os.environ.get("ATTNEDIT_VLLM", ROOT / ".venv-serve" / "bin" / "vllm"))
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not VLLM.is_file(), reason=f"no vLLM at {VLLM}: run examples/serve.sh"),
]

TEACHER = ROOT / "examples" / "embedded_teacher" / "model"
QUICKSTART = Path(os.environ.get("ATTNEDIT_QUICKSTART", ROOT / "outputs" / "quickstart"))
PROMPT, ANSWER = 600, 64
TOLERANCE = 1e-3
# vLLM's kernel for a CPU rotates interleaved pairs wrongly.
MLA_SETTINGS = {"compilation_config": {"custom_ops": ["none"]}}
PLUG_IN = {"max_num_batched_tokens": 256, "block_size": 16}  # at least; a CPU's are of 32
BACKEND = {**PLUG_IN, "trust_remote_code": True, "model_impl": "transformers"}

TIED = {"tie_word_embeddings": True}
WIDE = {"hidden_size": 128, "head_dim": 128}
NARROW = {"hidden_size": 128, "num_hidden_layers": 4}
MLA = {"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64}
SMALL_MLA = {"kv_lora_rank": 48, "qk_head_dim": 32, "qk_pos_emb_head_dim": 16}
CHOSEN = {"mla_rotary": "chosen"}
SWA = {"sliding_window": 64, "full_layers": "1,3"}
CELLS = {
    "mla": ("qwen3", WIDE, "mla", MLA, {}),
    "mla tied": ("llama", WIDE | TIED, "mla", MLA, {}),
    "mla padded": ("llama", NARROW | TIED, "mla", SMALL_MLA, {"pad_for_serving": 576}),
    "moe mla": ("qwen3_moe", WIDE, "mla", MLA, {}),
    "mla chosen": ("qwen3", WIDE | TIED, "mla", MLA | CHOSEN, {}),
    "mla chosen padded": ("llama", NARROW, "mla", SMALL_MLA | CHOSEN, {"pad_for_serving": 576}),
    "moe mla chosen": ("qwen3_moe", WIDE, "mla", MLA | CHOSEN, {}),
    "gate_swa elementwise": ("qwen3", NARROW | TIED, "gate_swa", SWA, {}),
    "gate_swa headwise": ("llama", NARROW, "gate_swa", SWA | {"output_gate": "headwise"}, {}),
    "gate_swa biases": ("qwen2", NARROW, "gate_swa", SWA, {}),
    "gate_swa sink logits": ("qwen3", NARROW, "gate_swa", SWA | {"sink": "logit"}, {}),
    "gate_swa sink logits, no gate": (
        "qwen3",
        NARROW,
        "gate_swa",
        SWA | {"sink": "logit", "output_gate": "none"},
        {},
    ),
    "moe gate_swa": ("qwen3_moe", NARROW, "gate_swa", SWA, {}),
}
OWN_CLASS = {
    "mla": "DeepseekV3ForCausalLM", "moe mla": "DeepseekV2ForCausalLM",
    "mla chosen": "MLAForCausalLM", "mla chosen padded": "MLAForCausalLM",
    "moe mla chosen": "MoEMLAForCausalLM",
    "gate_swa": "GateSWAForCausalLM", "moe gate_swa": "GateSWAMoeForCausalLM",
}  # fmt: skip


PATHS = ("own class", "transformers backend")
RUNS = [
    (cell, path) for cell in CELLS for path in PATHS if path == PATHS[0] or "chosen" not in cell
] + [
    (cell, "two ranks")
    for cell in ("gate_swa headwise", "gate_swa sink logits", "moe gate_swa", "mla", "mla chosen")
]


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    """Name of the cell, exported directory, the teacher's, and what transformers answers."""
    family, fields, name, flags, export = CELLS[request.param]
    folder = tmp_path_factory.mktemp("served")
    tiny_hf_dir(folder / "hf", family, max_position_embeddings=1024, **fields)
    chosen = flags.get("mla_rotary") is not None
    if chosen:
        tiny_data(folder / "data", folder / "hf", documents=8)
    make_student(folder, "student", name, flags, calibration=folder / "data" if chosen else None)
    out = make(folder / "student", folder / "out", "hf", dtype="float32", **export)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, VOCAB, (1, PROMPT), generator=generator)
    return request.param, out, folder / "hf", by_transformers(out, prompt)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """The same of a student that the quick start has trained, on text that it has not seen."""
    stage2 = QUICKSTART / request.param / "stage2"
    if not stage2.is_dir():
        pytest.skip(f"no {stage2}: run examples/quickstart.sh")
    padding = {"pad_for_serving": 576} if request.param == "mla" else {}
    out = tmp_path_factory.mktemp("trained") / "out"
    make(stage2, out, "hf", dtype="float32", **padding)
    with gzip.open(ROOT / "examples/embedded_teacher/text/heldout.jsonl.gz", "rt") as lines:
        text = "".join(json.loads(line)["text"] for line, _ in zip(lines, range(20), strict=False))
    ids = AutoTokenizer.from_pretrained(TEACHER)(text)["input_ids"][:PROMPT]
    assert len(ids) == PROMPT
    return request.param, out, TEACHER, by_transformers(out, torch.tensor([ids]))


def by_transformers(directory, prompt):
    """Prompt, log-probabilities of its tokens and the greedy answer."""
    config = json.loads((directory / "config.json").read_text())
    model = causal_lm_class(config).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        scores = model(prompt).logits[0].log_softmax(-1)[:-1].gather(1, prompt[0, 1:, None])
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return prompt[0].tolist(), scores[:, 0], tokens[0, PROMPT:]


@pytest.fixture(scope="module")
def plug_in(tmp_path_factory):
    """This package as pip installs it, without what it depends on."""
    target, source = (tmp_path_factory.mktemp(name) for name in ("plug_in", "source"))
    shutil.copytree(ROOT / "megatron_attnedit", source / "megatron_attnedit")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)  # a build leaves files where it is made
    python = VLLM.with_name("python")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([python, *command, "--target", target, source], check=True, capture_output=True)
    return target


def ask(directory, prompt, settings, scratch, *, plug_in=None):
    """What vLLM answers."""
    request, answer = scratch / "request.json", scratch / "answer.json"
    fields = {"model": str(directory), "prompt": prompt, "max_tokens": ANSWER, "settings": settings}
    request.write_text(json.dumps(fields))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(scratch / "code"), "VLLM_PLUGINS": ""}
    if plug_in:
        environment |= {"PYTHONPATH": str(plug_in), "VLLM_PLUGINS": "megatron_attnedit"}
    engine = Path(__file__).with_name("engine.py")
    run = subprocess.run(
        [VLLM.with_name("python"), engine, request, answer], env=environment, cwd=scratch,
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(answer.read_text())


def settings_of(cell, path):
    backend = path == "transformers backend"
    settings = dict(BACKEND if backend else PLUG_IN)
    if path == "two ranks":
        settings["tensor_parallel_size"] = 2
    if "mla" in cell:  # read in one piece on a CPU, in blocks of 16
        settings |= MLA_SETTINGS | {"max_num_batched_tokens": 1024}
    return settings


@pytest.mark.parametrize(("served", "path"), RUNS, indirect=["served"])
def test_it_answers_as_transformers_does(served, tmp_path, path, request):
    compare(served, tmp_path, path, request)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("trained", ["mla", "gate_swa"], indirect=True)
def test_what_the_quick_start_trained_does(trained, tmp_path, path, request):
    compare(trained, tmp_path, path, request)


def compare(student, tmp_path, path, request):
    cell, directory, teacher, (prompt, scores, tokens) = student
    own = path != "transformers backend"
    found = ask(
        directory, prompt, settings_of(cell, path), tmp_path,
        plug_in=request.getfixturevalue("plug_in") if own else None,
    )  # fmt: skip
    difference = (torch.tensor(found["log_probabilities"]) - scores).abs().max().item()
    ranks = settings_of(cell, path).get("tensor_parallel_size", 1)
    held, expected = compare_blocks(found, directory, teacher, ranks)
    print(f"{cell}, {path}, {found['class']}: {difference:.1e}, {held} of {expected} bytes")
    assert difference <= TOLERANCE
    assert found["tokens"] == tokens.tolist()
    kind = cell if cell in OWN_CLASS else cell.split()[0]
    assert found["class"] == OWN_CLASS[kind] if own else found["class"].startswith("Transformers")
    assert held == pytest.approx(expected, rel=0.02)


def compare_blocks(found, directory, teacher, ranks):
    """Bytes that a rank held in a step, and what the planner says, which counts bfloat16.

    Amid a block, because vLLM gives blocks back a step later than it could.
    """
    block = found["block_size"]
    tokens, held = [step for step in found["held"] if step[0] % block == block // 2][-1]
    planned = serve_student(
        read_hf_config(teacher), read_lineage(directory).attention(),
        ServingSize(gpu_memory=80, serving_tensor_parallel_size=ranks, block_size=block), tokens,
    )  # fmt: skip
    return held, 2 * planned.held_bytes


@pytest.mark.parametrize("path", PATHS)
def test_a_norm_that_no_kernel_has_is_refused(tmp_path, path, request):
    tiny_hf_dir(tmp_path / "hf", "qwen3", max_position_embeddings=1024, **WIDE)
    make_student(tmp_path, "student", "mla", MLA | {"qk_norm": "exact"})
    out = make(tmp_path / "student", tmp_path / "out", "hf", dtype="float32")
    plug_in = request.getfixturevalue("plug_in") if path == PATHS[0] else None
    # Without the plug-in a stock decoder is built, which does not have the rotation either.
    why = "--qk-norm exact: vLLM has no" if plug_in else "KeyError: .*listed"
    with pytest.raises(AssertionError, match=why):
        ask(out, [1, 2, 3], settings_of("mla", path), tmp_path, plug_in=plug_in)
