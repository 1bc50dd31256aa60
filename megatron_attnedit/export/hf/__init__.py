"""Hugging Face classes of students that no stock class loads.

The files beside this one stand alone: an export carries copies of those that it needs.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_attnedit.export.hf.configuration_gate_swa import GateSWAConfig
from megatron_attnedit.export.hf.configuration_moe_mla import MoEMLAConfig
from megatron_attnedit.export.hf.modeling_gate_swa import GateSWAForCausalLM
from megatron_attnedit.export.hf.modeling_moe_mla import MoEMLAForCausalLM


def register() -> None:
    """Let the Auto classes load exports without ``trust_remote_code``."""
    AutoConfig.register("gate_swa", GateSWAConfig, exist_ok=True)
    AutoModelForCausalLM.register(GateSWAConfig, GateSWAForCausalLM, exist_ok=True)
    AutoConfig.register("moe_mla", MoEMLAConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoEMLAConfig, MoEMLAForCausalLM, exist_ok=True)


__all__ = [
    "GateSWAConfig", "GateSWAForCausalLM", "MoEMLAConfig", "MoEMLAForCausalLM", "register"
]
