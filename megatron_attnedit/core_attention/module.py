"""Core attention (softmax of query times key, times value) for teacher and students.

Replaces mcore's ``DotProductAttention``, which is unfused, wants equal head sizes of keys and
values, and builds its masks on a CUDA device.
"""

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_attnedit.core_attention.backends import AttentionBackend, attention_backend
from megatron_attnedit.core_attention.context import attend_in_parts
from megatron_attnedit.core_attention.documents import Documents, Span
from megatron_attnedit.core_attention.per_head import per_head_parameter, sharded_by_heads


class CoreAttention(MegatronModule):
    """Causal attention, sliding when a window is given.

    Args:
        config: For Megatron's bookkeeping; head counts are taken from the tensors.
        backend: Name of an attention backend, or ``auto``.
        window_size: Megatron's ``(left, 0)``, or None for full attention.
        sink_tokens: First tokens of the sequence that stay visible outside the window.
        sink_logits: One more entry of each head's softmax, ``softmax_offset`` (mcore's name of it),
            which trains.
        softmax_scale: Default: 1 / sqrt(query's head size).
        unused: The rest of what mcore hands to a core attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        backend: str = "auto",
        window_size: tuple[int, int] | None = None,
        sink_tokens: int = 0,
        sink_logits: bool = False,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self._choose = functools.partial(
            attention_backend, backend, window_size, config.params_dtype, sink_tokens, sink_logits
        )
        self.backend = self._choose()
        self._with_documents: dict[tuple[int, int], AttentionBackend] = {}
        self.softmax_offset = _logits_of_heads(config) if sink_logits else None
        self.window_size = window_size
        self.sink_tokens = sink_tokens
        self.softmax_scale = softmax_scale
        self.recompute = config.recompute_granularity == "selective"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Documents | None,
        **unused: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[s, b, n, d]``; s is this rank's share under context parallelism.
            key: ``[s, b, g, d]``.
            value: ``[s, b, g, dv]``.
            attention_mask: Must be None: causality and window are this module's own.
            packed_seq_params: Whose documents do not see each other; without a default, so that no
                attention forgets to hand it on.
            unused: The rest of what mcore hands over.

        Returns:
            ``[s, b, n * dv]``.
        """
        assert attention_mask is None, "the attention mask is implied: causal, sliding or full"
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._attend,
                *(query, key, value, packed_seq_params),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return self._attend(query, key, value, packed_seq_params)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None
    ) -> Tensor:
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        given: dict[str, Any] = {}
        if self.softmax_offset is not None:
            given["sink"] = self.softmax_offset
        if documents is not None and documents.document_ids is None:  # positions alone
            documents = None
        backend = self._backend_for(documents, query.shape[-1], value.shape[-1])

        def attend(query: Tensor, key: Tensor, value: Tensor, span: Span | None = None) -> Tensor:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            seen = {} if span is None else {"documents": span}
            return backend(q, k, v, self.window_size, scale, **given, **seen).permute(2, 0, 1, 3)

        if self.config.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
            out = attend_in_parts(
                attend, query, key, value, self.window_size, group, self.sink_tokens, documents
            )
        elif documents is not None:
            out = attend(query, key, value, documents.span(0, 0, key.shape[0]))
        else:
            out = attend(query, key, value)
        return out.flatten(2)

    def _backend_for(
        self, documents: Documents | None, head_dim: int, value_dim: int
    ) -> AttentionBackend:
        if documents is None:
            return self.backend
        sizes = (head_dim, value_dim)
        if sizes not in self._with_documents:
            self._with_documents[sizes] = self._choose(documents_with=sizes)
        return self._with_documents[sizes]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For mcore's checkpoints: the sink logits, cut by heads."""
        return sharded_by_heads(self, "softmax_offset", prefix, sharded_offsets, metadata)


def _logits_of_heads(config: TransformerConfig) -> torch.nn.Parameter:
    """``[n]`` of this rank's heads."""
    size = config.num_attention_heads // config.tensor_model_parallel_size
    logits = per_head_parameter(config, size)
    assert config.init_method is not None
    config.init_method(logits)
    return logits
