"""Hugging Face classes of GateSWA; an export carries copies of the files beside this one.

The files stand alone: they import nothing of this program. Each is imported when it is asked for.
"""

# Names in the ``auto_map`` of an export's ``config.json``.
CAUSAL_LMS = ("modeling_gate_swa.GateSWAForCausalLM",)


def register() -> None:
    """Let the Auto classes load exports without ``trust_remote_code``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_attnedit.attention.gate_swa.hf.configuration_gate_swa import GateSWAConfig
    from megatron_attnedit.attention.gate_swa.hf.modeling_gate_swa import GateSWAForCausalLM

    AutoConfig.register(GateSWAConfig.model_type, GateSWAConfig, exist_ok=True)
    AutoModelForCausalLM.register(GateSWAConfig, GateSWAForCausalLM, exist_ok=True)
