"""Which tokens count on this rank."""

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def local_token_mask(loss_mask: Tensor, config: TransformerConfig) -> Tensor:
    """A batch's mask ``[b, s]`` in the layout of hidden states: ``[s, b]``, float32.

    Under sequence parallelism ``[s/tp, b]``: the rows that this rank holds.
    """
    mask = loss_mask.t().float()
    if config.sequence_parallel:
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        mask = mask.chunk(tp_size)[parallel_state.get_tensor_model_parallel_rank()]
    return mask
