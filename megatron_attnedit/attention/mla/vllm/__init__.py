"""MLA whose layers turn with frequencies of their own, as models of vLLM, 0.26 to 0.33.

Other MLA students are DeepSeek's classes, which vLLM has.
"""

ARCHITECTURES = ("MLAForCausalLM", "MoEMLAForCausalLM")
# Registered to be refused in a sentence.
REFUSED = ("QKNormMLAForCausalLM", "QKNormMoEMLAForCausalLM")


def register() -> None:
    """Tell vLLM of the classes, which it imports when it needs them."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES + REFUSED:
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")
