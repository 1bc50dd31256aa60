"""Hugging Face classes of MLA; an export carries copies of the files beside this one.

The files stand alone: they import nothing of this program.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_attnedit.attention.mla.hf.configuration_moe_mla import MoEMLAConfig
from megatron_attnedit.attention.mla.hf.modeling_moe_mla import MoEMLAForCausalLM


def register() -> None:
    """Let the Auto classes load exports without ``trust_remote_code``."""
    AutoConfig.register("moe_mla", MoEMLAConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoEMLAConfig, MoEMLAForCausalLM, exist_ok=True)


__all__ = ["MoEMLAConfig", "MoEMLAForCausalLM", "register"]
