"""What Megatron-Core says to those who write programs with it, kept from those who use this one."""

import logging
import warnings

# By logger: how messages begin that name this program's choices as outdated or as missing.
ADVICE = {
    # The successor refuses models that mix MLA and other attentions.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # The other writers are those of the package nvidia-resiliency-ext.
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # What it computes is what would have been given.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_",
}
# By torch, on calls that Megatron-Core makes; since torch 2.13.
CALLS = (
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    r"`load_state_dict` is deprecated",
    r"The argument order of load has been changed",
    r"torch\.distributed is disabled, unavailable or uninitialized",
)


def quiet_megatron() -> None:
    """Its notes, also on optional packages that are absent, would bury what this program says."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=r"(?s).*megatron\.core")
    for message in CALLS:
        warnings.filterwarnings("ignore", message=message)
    for name, beginning in ADVICE.items():
        logging.getLogger(name).addFilter(_Unless(beginning))


class _Unless(logging.Filter):
    """Lets pass what does not begin like that."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)
