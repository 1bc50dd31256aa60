"""Student attentions: values and all gradients against plain PyTorch, at awkward sizes."""

import dataclasses

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads  # noqa: F401  (imports mcore fully)
from megatron.core.transformer.spec_utils import build_module

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.gate_swa.reference import gate_swa_reference
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.mla.reference import mla_reference
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.student import fill_attentions
from tests.support import processes
from tests.support.models import start_megatron, tiny_hf_dir

TOLERANCE = 1e-4  # relative, per tensor; float32 rounding gives about 1e-6
BATCH = 2

STUDENTS = {
    "mla": ("mla", {}),
    "mla, value head not the query's size": ("mla", {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8}),
    "mla, chosen frequencies": ("mla", {"qk_pos_emb_head_dim": 12, "mla_rotary": "chosen"}),
    "mla, QK-norm": ("mla", {"qk_pos_emb_head_dim": 12, "qk_norm": "exact"}),
    "gate_swa": ("gate_swa", {"sliding_window": 8, "full_layers": "none"}),
    "gate_swa headwise": (
        "gate_swa",
        {"sliding_window": 8, "full_layers": "none", "output_gate": "headwise"},
    ),
    "gate_swa window 2": ("gate_swa", {"sliding_window": 2, "full_layers": "none"}),
    "gate_swa sinks": ("gate_swa", {"sliding_window": 8, "sink_tokens": 3, "full_layers": "none"}),
    "gate_swa more sinks than window": (
        "gate_swa",
        {"sliding_window": 4, "sink_tokens": 9, "full_layers": "none", "output_gate": "headwise"},
    ),
    "gate_swa sink logits": (
        "gate_swa",
        {"sliding_window": 8, "sink": "logit", "full_layers": "none"},
    ),
    "gate_swa sink logits, no gate": (
        "gate_swa",
        {"sliding_window": 8, "sink": "logit", "full_layers": "none", "output_gate": "none"},
    ),
    "gate_swa window over sequence": ("gate_swa", {"sliding_window": 500, "full_layers": "none"}),
}
TEACHERS = {
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "one kv group": ("qwen3", {"num_key_value_heads": 1}),
}


# Of each layer; one pair with three components.
PAIRS = ((9, 1, 4, 4, 0, 4), (3, 2, 1, 0, 15, 7), (5, 5, 5, 5, 5, 5))


def make_student(case, hf):
    name, flags = STUDENTS[case]
    student = {"mla": MLA, "gate_swa": GateSWA}[name].from_flags(flags, hf)
    if flags.get("mla_rotary"):
        student = dataclasses.replace(student, rotary_pairs=PAIRS)
    return student


def random_weights(student, hf):
    """Far from any special point: every gradient is of ordinary size."""
    generator = torch.Generator().manual_seed(3)
    return {
        row.megatron_param.split(".self_attention.")[1]: row.layout.join(
            [torch.randn(shape, generator=generator) * 0.1 for shape in row.hf_shapes]
        )
        for row in student.rows(hf, 0)
    }


def reference(case, hf, length):
    """Output, input gradient and weight gradients in one process without Megatron."""
    student = make_student(case, hf)
    weights = {k: v.requires_grad_() for k, v in random_weights(student, hf).items()}
    x = torch.randn(length, BATCH, hf.hidden_size, generator=torch.Generator().manual_seed(5))
    x.requires_grad_()
    if isinstance(student, MLA):
        frequencies = None
        if student.rotary_pairs:
            pairs = torch.tensor(student.rotary_pairs[0])
            frequencies = hf.rope_theta ** (-2.0 * pairs / hf.head_dim)
        out = mla_reference(weights, x, student, frequencies, hf.rms_norm_eps)
    else:
        out = gate_swa_reference(
            weights,
            x,
            hf,
            sliding_window=student.sliding_window,
            output_gate=student.output_gate,
            sink_tokens=student.sink_tokens,
            sink_logits=student.sink_logits,
        )
    out.backward(direction(out))
    return out.detach(), x.grad, {k: v.grad for k, v in weights.items()}


def direction(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9))


def on_grid(case, hf_dir, length, tp_size, sequence_parallel):
    """The Megatron module's output, input gradient and weight gradients on this rank."""
    start_megatron(tp_size)
    rank = parallel_state.get_tensor_model_parallel_rank()
    hf = read_hf_config(hf_dir)
    student = make_student(case, hf)
    grid = ParallelConfig(tensor_model_parallel_size=tp_size, sequence_parallel=sequence_parallel)
    config = transformer_config(hf, grid, torch.float32)
    attention = build_module(
        student.spec(config, attention_backend="auto"), config=config, layer_number=1
    )
    rows = {row.megatron_param: row for row in student.rows(hf, 0)}
    fill_attentions(
        {0: attention},
        iter([(0, random_weights(student, hf))]),
        rows,
        tp_rank=rank,
        tp_size=tp_size,
    )
    x = torch.randn(length, BATCH, hf.hidden_size, generator=torch.Generator().manual_seed(5))
    cut = (lambda t: t.chunk(tp_size)[rank]) if sequence_parallel else (lambda t: t)
    x = cut(x).clone().requires_grad_()
    out, _ = attention(x, None, rotary_pos_emb=rotary_table(hf, length))
    # Backward of the model's own loss: every rank starts from the same gradient of its output.
    out.backward(cut(direction(torch.empty(length, *out.shape[1:]))))
    grads = {}
    for name, param in attention.named_parameters():
        grads[name] = param.grad
        shared_norm = "q_layernorm" in name or "k_layernorm" in name
        if tp_size > 1 and (getattr(param, "sequence_parallel", False) or shared_norm):
            torch.distributed.all_reduce(
                param.grad, group=parallel_state.get_tensor_model_parallel_group()
            )
    return out.detach(), x.grad, grads


def rotary_table(hf, length):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    return RotaryEmbedding(hf.head_dim, 1.0, rotary_base=hf.rope_theta)(length)


def assert_close(name, actual, expected, scale=0.0):
    """Relative to the tensor, or to 1e-5 of ``scale`` where the tensor is nothing but rounding."""
    assert actual.shape == expected.shape, name
    error = (actual - expected).norm() / max(expected.norm(), 1e-5 * scale)
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("tp_size, sequence_parallel", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("case", STUDENTS)
def test_values_and_gradients(tmp_path, case, teacher, tp_size, sequence_parallel):
    length = 64 if sequence_parallel else 63
    family, overrides = TEACHERS[teacher]
    if family == "qwen2" and "mla" in case:
        pytest.skip("refused: biases")
    if family == "llama" and "QK-norm" in case:
        pytest.skip("refused: no norm to keep")
    hf_dir = tiny_hf_dir(tmp_path / "hf", family, **overrides)
    hf = read_hf_config(hf_dir)
    expected_out, expected_x, expected_grads = reference(case, hf, length)
    answers = processes.run(tp_size, on_grid, case, hf_dir, length, tp_size, sequence_parallel)
    outs, x_grads, grads = zip(*answers, strict=True)
    if sequence_parallel:
        assert_close("output", torch.cat(outs), expected_out)
        assert_close("input gradient", torch.cat(x_grads), expected_x)
    else:
        for out, x_grad in zip(outs, x_grads, strict=True):
            assert_close("output", out, expected_out)
            assert_close("input gradient", x_grad, expected_x)
    # With a window of one token queries and keys have no effect: their gradients are zero.
    scale = max(grad.norm() for grad in expected_grads.values())
    for row in make_student(case, hf).rows(hf, 0):
        name = row.megatron_param.split(".self_attention.")[1]
        whole = row.layout.join(row.to_hf([grad[name] for grad in grads]))
        assert_close(name, whole, expected_grads[name], scale)
