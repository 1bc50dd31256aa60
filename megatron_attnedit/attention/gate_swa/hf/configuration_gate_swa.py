"""Configuration of a GateSWA model: Qwen3 or Llama with gated, sliding layers."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

AUTO_MAP = {
    "AutoConfig": "configuration_gate_swa.GateSWAConfig",
    "AutoModel": "modeling_gate_swa.GateSWAModel",
    "AutoModelForCausalLM": "modeling_gate_swa.GateSWAForCausalLM",
}
LAYER_TYPES = {"sliding_attention", "full_attention"}
OUTPUT_GATES = ("elementwise", "headwise", "none")
SINKS = ("none", "logit")


@strict
class GateSWAConfig(Qwen3Config):
    """Qwen3's fields, and what is new.

    Attributes:
        qk_norm: RMSNorm of queries and keys (Qwen3 yes, Llama no).
        output_gate: ``elementwise``, ``headwise`` or ``none``; of sliding layers, full layers have
            none.
        sliding_window: Tokens that a sliding layer sees, the token itself counted; at least 2.
        sink_tokens: First tokens of the sequence that a sliding layer sees beside its window.
        sink: ``logit``: the softmax of a sliding layer's heads has one more entry, learned and
            without a value (``self_attn.sinks``); ``none``: it has not.
        attention_bias: Bias of the query, key and value projections.
        attention_output_bias: Bias of the output projection.
        num_experts: Experts of every layer (Qwen3-MoE); 0 is a dense MLP.
        num_experts_per_tok: Experts a token is routed to.
        moe_intermediate_size: Width of an expert.
        norm_topk_prob: Whether the weights of the chosen experts are scaled to sum to one.

    Raises:
        ValueError: The layer types, the window, the output gate or the sinks make no model.
    """

    model_type = "gate_swa"
    base_model_tp_plan = {
        **Qwen3Config.base_model_tp_plan,
        "layers.*.self_attn.g_proj": "colwise",
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }

    use_sliding_window: bool = True
    qk_norm: bool = True
    output_gate: str = "elementwise"
    sink_tokens: int = 0
    sink: str = "none"
    attention_output_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # A teacher's config says false here, and Qwen3Config would then forget the window.
        self.use_sliding_window = True
        # transformers 5.2x writes Qwen3-MoE's num_experts under this name.
        self.num_experts = kwargs.pop("num_local_experts", self.num_experts)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types must name {self.num_hidden_layers} layers")
        if not set(self.layer_types) <= LAYER_TYPES:
            raise ValueError(f"layer_types must be of {sorted(LAYER_TYPES)}: {self.layer_types}")
        if self.output_gate not in OUTPUT_GATES:
            raise ValueError(f"output_gate must be of {OUTPUT_GATES}, not {self.output_gate!r}")
        # transformers' sliding cache keeps W-1 tokens, and with W=1 its slice keeps all of them.
        if self.sliding_window is None or self.sliding_window < 2:
            raise ValueError(f"sliding_window must be at least 2, not {self.sliding_window}")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be 0 or more, not {self.sink_tokens}")
        if self.sink not in SINKS:
            raise ValueError(f"sink must be of {SINKS}, not {self.sink!r}")


__all__ = ["GateSWAConfig"]
