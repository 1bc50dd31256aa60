"""Hugging Face classes of students that no stock class loads.

The two files beside this one stand alone: an export carries copies of them.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_attnedit.export.hf.configuration_gate_swa import GateSWAConfig
from megatron_attnedit.export.hf.modeling_gate_swa import GateSWAForCausalLM


def register() -> None:
    """Let the Auto classes load exports without ``trust_remote_code``."""
    AutoConfig.register("gate_swa", GateSWAConfig, exist_ok=True)
    AutoModelForCausalLM.register(GateSWAConfig, GateSWAForCausalLM, exist_ok=True)


__all__ = ["GateSWAConfig", "GateSWAForCausalLM", "register"]
