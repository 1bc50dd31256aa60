"""GateSWA as a model of vLLM's own, for vLLM 0.26 to 0.33.

Its sliding layers cache their window and nothing more, which vLLM's other way to run a directory
with its own modelling file (``--trust-remote-code --model-impl transformers``) does as well, but
slower.
"""

ARCHITECTURES = ("GateSWAForCausalLM", "GateSWAMoeForCausalLM")


def register() -> None:
    """Tell vLLM of the classes, which it imports when it needs them."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from megatron_attnedit.attention.gate_swa.hf.configuration_gate_swa import GateSWAConfig

    AutoConfig.register(GateSWAConfig.model_type, GateSWAConfig, exist_ok=True)
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")
