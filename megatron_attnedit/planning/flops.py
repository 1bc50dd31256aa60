"""Floating-point operations of a token, for the log line's TFLOP/s."""

from megatron_attnedit.convert.hf_config import HFConfig


def attention_flops(hf: HFConfig, seq_length: int) -> float:
    """Forward, one token, one layer: projections, scores and values of the teacher's attention.

    A multiply-add counts 2; a token sees half of the sequence on average. Students are counted as
    the teacher, so that figures compare over student attentions.
    """
    q = hf.num_attention_heads * hf.head_dim
    kv = 2 * hf.num_key_value_heads * hf.head_dim
    return 2 * hf.hidden_size * (2 * q + kv) + 2 * q * seq_length


def mlp_flops(hf: HFConfig) -> float:
    """Forward, one token, one layer; of experts, those it is routed to and the router."""
    if hf.num_experts:
        experts = 6 * hf.moe_intermediate_size * hf.num_experts_per_tok
        return hf.hidden_size * (experts + 2 * hf.num_experts)
    return 6 * hf.hidden_size * hf.intermediate_size


def stage1_flops(hf: HFConfig, seq_length: int, *, runs_student: bool = False) -> float:
    """Per token: the teacher forward without its head, the student's attentions both ways.

    Args:
        hf: The teacher.
        seq_length: Tokens of a sample.
        runs_student: The student's hidden states pass through the MLPs, too.
    """
    attention = attention_flops(hf, seq_length)
    return hf.num_hidden_layers * ((1 + runs_student) * mlp_flops(hf) + 4 * attention)


def stage2_flops(hf: HFConfig, seq_length: int, *, trainable: str = "attention") -> float:
    """Per token: the teacher forward, the student forward and backward, both with heads.

    The gradients of frozen weights are not computed: the MLP's and the head's backward then costs
    as much as their forward, and twice that where everything is trained.

    Args:
        hf: The teacher.
        seq_length: Tokens of a sample.
        trainable: ``attention`` or ``all``.
    """
    attention = attention_flops(hf, seq_length)
    head = 2 * hf.hidden_size * hf.vocab_size
    passes = 4 if trainable == "all" else 3
    return hf.num_hidden_layers * (passes * mlp_flops(hf) + 4 * attention) + passes * head
