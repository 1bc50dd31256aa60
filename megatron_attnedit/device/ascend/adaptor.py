"""What makes Megatron-Core, which is written for CUDA, run on an NPU.

MindSpeed (branch core_r0.16.0) replaces parts of Megatron-Core when it is imported, so it comes
before the first ``megatron`` import; it reads ``sys.argv``, which is not meant for it; and options
are handed to it once more, explicitly, before Megatron's groups are formed. Another adaptor, such
as the MegatronAdaptor that comes with TransformerEngineNPU for later versions, is a module's name
in ``MEGATRON_ATTNEDIT_ADAPTOR``: it is imported, and its ``repatch`` called if it has one.
Without any (``none``, or nothing installed) ``without_adaptor`` repairs what fails.
"""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from megatron_attnedit.device.ascend import without_adaptor
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

VARIABLE = "MEGATRON_ATTNEDIT_ADAPTOR"
MINDSPEED = "mindspeed.megatron_adaptor"
MISSING = {
    "megatron": "it wants Megatron-LM's source; use MindSpeed's branch core_r0.16.0, which goes "
    "with the megatron-core package",
    "triton": "install triton-ascend",
    "megatron_adaptor": "MindSpeed's branches core_r0.17.0 and later build upon the packages "
    "MegatronAdaptor and TransformerEngineNPU; install those of the same branch",
}

# Said to MindSpeed whatever the run. What this package does itself stays off there: its own core
# attention, rotary embedding, MLA, grouped matmul and weight gradients.
OPTIONS = {
    "use_flash_attn": True,
    "use_fused_rmsnorm": True,
    "use_fused_swiglu": True,
    "use_fused_rotary_pos_emb": False,
    "multi_latent_attention": False,
    "moe_grouped_gemm": False,
    "gradient_accumulation_fusion": False,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "context_parallel_algo": "megatron_cp_algo",
}


@dataclass(frozen=True)
class Adaptor:
    """The adaptor in force.

    Attributes:
        name: Its module, or ``none``.
        repatch: Takes options by the names of Megatron's flags; None where it has no such function.
    """

    name: str
    repatch: Callable[[dict[str, Any]], object] | None = None

    def configure(self, grid: Mapping[str, Any]) -> None:
        """Hand over the run's layout and the fixed options; before Megatron's groups are formed.

        MindSpeed puts them into every ``TransformerConfig`` that does not set them itself, where
        an empty text is no default: an empty pipeline layout is one without layers. What is empty
        is therefore handed over as Megatron's default, None.
        """
        if self.repatch is not None:
            options = {name: None if value == "" else value for name, value in grid.items()}
            with hidden_argv():
                self.repatch({**OPTIONS, **options})


@contextlib.contextmanager
def hidden_argv() -> Iterator[None]:
    """Nothing but the program's name in ``sys.argv``."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = argv


def _wanted() -> str:
    name = os.environ.get(VARIABLE, "auto")
    if name != "auto":
        return name
    return MINDSPEED if find_spec("mindspeed") is not None else "none"


def load_adaptor() -> Adaptor:
    """Import the adaptor; ``torch_npu`` is loaded.

    Raises:
        UserError: it is not installed, or it is one for another Megatron.
    """
    loaded = [name for name in sys.modules if name.startswith("megatron.core")]
    if loaded:
        raise RuntimeError(f"{loaded[0]} was imported before the accelerator was prepared")
    name = _wanted()
    if name == "none":
        without_adaptor.install()
        logger.warning("no Megatron adaptor: %s", without_adaptor.LOST)
        return Adaptor(name)
    return imported(name)


def imported(name: str) -> Adaptor:
    """The adaptor of that module's name.

    Raises:
        UserError: it is not installed, or something that it wants is not.
    """
    try:
        with hidden_argv():
            module = importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        hint = MISSING.get(missing, f"{VARIABLE}=none does without")
        raise UserError(f"{VARIABLE}: {name} cannot be imported ({error}); {hint}") from None
    return Adaptor(name, getattr(module, "repatch", None))
