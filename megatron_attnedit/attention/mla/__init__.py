"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

from megatron_attnedit.attention.mla.config import MLA

__all__ = ["MLA"]
