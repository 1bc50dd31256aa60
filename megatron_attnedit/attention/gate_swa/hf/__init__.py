"""Hugging Face classes of GateSWA; an export carries copies of the files beside this one.

The files stand alone: they import nothing of this program.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_attnedit.attention.gate_swa.hf.configuration_gate_swa import GateSWAConfig
from megatron_attnedit.attention.gate_swa.hf.modeling_gate_swa import GateSWAForCausalLM


def register() -> None:
    """Let the Auto classes load exports without ``trust_remote_code``."""
    AutoConfig.register("gate_swa", GateSWAConfig, exist_ok=True)
    AutoModelForCausalLM.register(GateSWAConfig, GateSWAForCausalLM, exist_ok=True)


__all__ = ["GateSWAConfig", "GateSWAForCausalLM", "register"]
