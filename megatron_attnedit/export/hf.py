"""Hugging Face classes of the students that no stock class loads."""

import importlib
from importlib.util import find_spec

from megatron_attnedit.attention.registry import STUDENT_ATTENTIONS


def register() -> None:
    """Let transformers' Auto classes load exports without ``trust_remote_code``.

    A student attention that exports classes of its own has a package ``hf`` beside its
    configuration, with a ``register`` of its own; that package imports nothing of Megatron.
    """
    for place in STUDENT_ATTENTIONS.values():
        package = place.partition(":")[0].rpartition(".")[0] + ".hf"
        if find_spec(package) is not None:
            importlib.import_module(package).register()
