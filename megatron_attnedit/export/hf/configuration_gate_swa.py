"""Configuration of a GateSWA model: Qwen3 or Llama with gated, sliding layers."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config


@strict
class GateSWAConfig(Qwen3Config):
    """Qwen3's fields, and what is new.

    Attributes:
        qk_norm: RMSNorm of queries and keys (Qwen3 yes, Llama no).
        output_gate: ``elementwise`` or ``headwise``; sliding layers have it, full layers do not.
        sliding_window: Tokens that a sliding layer sees, the token itself counted.
    """

    model_type = "gate_swa"

    use_sliding_window: bool = True
    qk_norm: bool = True
    output_gate: str = "elementwise"


__all__ = ["GateSWAConfig"]
