"""HF -> Megatron -> HF gives the same bytes; an exported student computes what Megatron does."""

import json

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.checkpoint.conversion import ConversionConfig, convert
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.evaluate.kv_cache import cache_bytes
from megatron_attnedit.export.hf import causal_lm_class
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import full_logits
from megatron_attnedit.training.setup import load_teacher, start_processes, stop_processes
from megatron_attnedit.training.student import Student
from tests.support import processes
from tests.support.inputs import make_student
from tests.support.models import tiny_hf_dir, tokens
from tests.support.thinning import every_other

TOLERANCE = 1e-4  # the bar; float32 rounding gives about 2e-6

STUDENTS = {
    "mla": ("mla", {}),
    "mla small rotary part": ("mla", {"qk_head_dim": 24, "qk_pos_emb_head_dim": 8}),
    "gate_swa": ("gate_swa", {"sliding_window": 8, "full_layers": "1"}),
    "gate_swa sinks": ("gate_swa", {"sliding_window": 8, "sink_tokens": 3, "full_layers": "1"}),
    "gate_swa sink logits": (
        "gate_swa",
        {"sliding_window": 8, "sink": "logit", "full_layers": "1"},
    ),
    "gate_swa sink logits, no gate": (
        "gate_swa",
        {"sliding_window": 8, "sink": "logit", "full_layers": "1", "output_gate": "none"},
    ),
    "gate_swa headwise": (
        "gate_swa",
        {"sliding_window": 8, "full_layers": "none", "output_gate": "headwise"},
    ),
}


def random_student(folder, hf_dir, case):
    name, flags = STUDENTS[case]
    make_student(folder.parent, folder.name, name, flags, teacher=hf_dir)
    return folder


def student_logits(hf_dir, folder, tp_size, ids):
    experts = read_hf_config(hf_dir).num_experts > 0  # they need sequence parallelism
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp_size, sequence_parallel=experts and tp_size > 1
    )
    accelerator = start_processes(parallel)
    teacher = load_teacher(str(hf_dir), parallel, torch.float32, accelerator)
    start = run_folder.find(str(folder), "--load")
    student = Student(teacher, start, read_lineage(start), attention_backend="auto")
    return full_logits(student.chunks[0], ids, teacher.hf.vocab_size)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_byte_identical(tmp_path, family, tied):
    source = tiny_hf_dir(tmp_path / "hf", family, tie_word_embeddings=tied, dtype="bfloat16")
    convert(ConversionConfig(source=source, output=tmp_path / "megatron", format="torch_dist"))
    convert(ConversionConfig(source=tmp_path / "megatron", output=tmp_path / "back", format="hf"))
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize(
    ("case", "teacher"), every_other(STUDENTS, ["qwen3", "qwen3_moe", "qwen2", "llama"])
)
def test_exported_student(tmp_path, case, teacher):
    if teacher == "qwen2" and "mla" in case:
        pytest.skip("refused: biases")
    hf_dir = tiny_hf_dir(tmp_path / "hf", teacher)
    folder = random_student(tmp_path / "student", hf_dir, case)
    convert(ConversionConfig(source=folder, output=tmp_path / "out", format="hf", dtype="float32"))
    ids = tokens(length=64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = causal_lm_class(config).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        exported = model(ids).logits
    for tp_size in (1, 2):
        for logits in processes.run(tp_size, student_logits, hf_dir, folder, tp_size, ids):
            assert (logits - exported).abs().max() <= TOLERANCE
    assert exported.abs().max() > 1
    if teacher != "qwen3_moe":  # whose experts transformers stacks
        assert HFReader(tmp_path / "out").shapes.keys() == model.state_dict().keys()
    assert type(model.model.layers[0].mlp).__name__.startswith(
        "Qwen3MoeSparse" if teacher == "qwen3_moe" else ("DeepseekV3MLP", "Qwen3MLP")
    )


def test_an_exported_cache_keeps_window_and_sinks(tmp_path):
    """Loaded from the written directory alone, bytes counted on a filled cache."""
    hf_dir = tiny_hf_dir(tmp_path / "hf")
    folder = random_student(tmp_path / "student", hf_dir, "gate_swa sinks")
    convert(ConversionConfig(source=folder, output=tmp_path / "out", format="hf", dtype="float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
        # Not by an Auto class: where the package's own classes are registered, it takes those.
        written = get_class_from_dynamic_module(
            "modeling_gate_swa.GateSWAForCausalLM", tmp_path / "out"
        )
        model = written.from_pretrained(tmp_path / "out")
    assert "transformers_modules" in type(model).__module__
    hf = read_hf_config(hf_dir)
    token = 2 * hf.num_key_value_heads * hf.head_dim * 4
    assert cache_bytes(model, 64) == (64 + 2 * (8 + 3 - 1)) * token
    ids = tokens(length=64)
    with torch.no_grad():
        first = model(ids[:, :40], use_cache=True)
        steps = [first.logits]
        for position in range(40, 64):
            one = ids[:, position : position + 1]
            step = model(one, past_key_values=first.past_key_values, use_cache=True)
            steps.append(step.logits)
        whole = model(ids).logits
    assert (torch.cat(steps, 1) - whole).abs().max() <= TOLERANCE


def test_all_processes_left(tmp_path):
    """The tools above leave no process group behind."""
    assert not torch.distributed.is_initialized()
    start_processes(ParallelConfig())
    stop_processes()
    assert not torch.distributed.is_initialized()
