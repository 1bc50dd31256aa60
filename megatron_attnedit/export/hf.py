"""Hugging Face classes of the students that no stock class serves best.

A student attention that exports classes of its own has a package ``hf`` beside its configuration:
``CAUSAL_LMS`` names them as an export's ``auto_map`` does, ``register`` tells the Auto classes of
them, and nothing in it imports Megatron. These classes are loaded instead of a directory's own
files, so no code from a directory runs.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM

from megatron_attnedit.export.packages import packages


def register() -> None:
    """Let transformers' Auto classes load exports without ``trust_remote_code``."""
    for package in packages("hf"):
        package.register()


def causal_lm_class(config: Mapping[str, Any]) -> Any:
    """The class that loads a directory with this ``config.json``; ``AutoModelForCausalLM`` too.

    ``from_pretrained`` works on either; build from a configuration with ``_from_config``.
    """
    register()
    named = str((config.get("auto_map") or {}).get("AutoModelForCausalLM"))
    for package in packages("hf"):
        if named in package.CAUSAL_LMS:
            module, _, cls = named.partition(".")
            return getattr(importlib.import_module(f"{package.__name__}.{module}"), cls)
    return AutoModelForCausalLM
