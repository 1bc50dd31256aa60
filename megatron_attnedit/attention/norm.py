"""RMSNorm that sequence parallelism knows about."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_attnedit.device.kernels import has_own_kernels, rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with mcore's constructor.

    Under sequence parallelism each rank sees other tokens, and the mark on the weight makes mcore
    add the gradients up. mcore's ``WrappedTorchNorm`` refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.eps: float = eps
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension."""
        if has_own_kernels(x):
            return rms_norm(x, self.weight, self.eps)
        return super().forward(x)
