"""GateSWA: gated attention that slides a window in most layers and stays full in a few."""

from megatron_attnedit.attention.gate_swa.config import GateSWA

__all__ = ["GateSWA"]
