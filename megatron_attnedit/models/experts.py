"""Experts that are all in this process: tokens are sorted, not sent.

Megatron's dispatcher asks the device in every layer how many tokens each expert gets, and waits for
the answer. Where nothing is sent nobody needs it: ``t`` tokens make ``t * k`` rows whatever the
router says. So the host can queue work ahead, and a micro-batch can be recorded.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor


def _spread(tokens: Tensor, slots: Tensor, topk: int) -> Tensor:
    """``[t, h]`` to ``[t * k, h]``: row i is the token that slot i belongs to."""
    return tokens[slots // topk]


def _gather(rows: Tensor, places: Tensor, topk: int) -> Tensor:
    """``[t * k, h]`` to ``[t, h]``: each token's rows, added up in one pass."""
    return rows[places].unflatten(0, (-1, topk)).sum(1)


class _Spread(torch.autograd.Function):
    """Each is the other's gradient; left to autograd, rows would be added up one by one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, places: Tensor, topk: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.topk = topk
        return _spread(tokens, slots, topk)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _gather(grad_outputs[0], places, ctx.topk), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, places: Tensor, topk: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.topk = topk
        return _gather(rows, places, topk)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (slots,) = ctx.saved_tensors
        return _spread(grad_outputs[0], slots, ctx.topk), None, None, None


class LocalTokenDispatcher(MoETokenDispatcher):
    """Rows in the order of their experts; those of an expert in the order of their tokens.

    A *slot* is one of a token's k routings: ``token * k + j``. ``slots`` holds them as the experts
    see them, ``places`` where each went.
    """

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sort.

        Args:
            tokens: ``[s, b, h]``.
            routing_map: ``[s * b, experts]``, k in a row are true.
            probs: ``[s * b, experts]``.

        Returns:
            ``[s * b, h]``, and ``[s * b * k]`` probabilities as the experts see them.
        """
        self._shape, topk = tokens.shape, self.config.moe_router_topk
        experts = routing_map.float().topk(topk, dim=-1).indices
        slots = experts.flatten().argsort(stable=True)
        # Stable there, too: the other sort of an NPU goes by way of float32.
        self._order = slots, slots.argsort(stable=True), topk
        self._counts = routing_map.sum(0)
        return tokens.reshape(-1, tokens.shape[-1]), probs.gather(1, experts).flatten()[slots]

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is sent."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``[s * b * k, h]``, how many each expert gets (on the device), probabilities."""
        return _Spread.apply(hidden_states, *self._order), self._counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """``[s * b * k, h]`` to ``[s * b, h]``."""
        return _Gather.apply(hidden_states, *self._order)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Nothing is sent."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """In the shape in which tokens came."""
        return hidden_states.view(self._shape)


def mark_expert_gradients(model: GPTModel) -> None:
    """Have experts' gradients reduced over the processes that hold the same part of them.

    Mcore does so where experts are spread over processes; where they are only cut otherwise than
    the rest of the model, it would add up over the copies of the rest.
    """
    config = model.config
    if config.expert_tensor_parallel_size == config.tensor_model_parallel_size:
        return
    for layer in model.decoder.layers:
        for param in layer.mlp.experts.parameters() if hasattr(layer.mlp, "experts") else ():
            param.allreduce = False


def use_local_dispatcher(model: GPTModel) -> None:
    """Give layers whose experts are all in this process a dispatcher that only sorts."""
    for layer in model.decoder.layers:
        usual = getattr(layer.mlp, "token_dispatcher", None)
        if usual and usual.ep_size == usual.tp_size == 1:
            layer.mlp.token_dispatcher = LocalTokenDispatcher(
                model.config, get_default_pg_collection()
            )
