"""Hugging Face classes of MLA; an export carries copies of the files beside this one.

The files stand alone: they import nothing of this program. Each is imported when it is asked for.
Stock DeepSeek classes load the same directories, so the Auto classes need no registration.
"""

# Names in the ``auto_map`` of an export's ``config.json``.
CAUSAL_LMS = (
    "modeling_mla.MLAForCausalLM",
    "modeling_moe_mla.MoEMLAForCausalLM",
    "modeling_qk_norm_mla.QKNormMLAForCausalLM",
    "modeling_qk_norm_mla.QKNormMoEMLAForCausalLM",
)


def register() -> None:
    """The Auto classes load exports as they are."""
