"""Repairs of what Megatron-Core takes for granted and a CPU with gloo lacks."""

from typing import Any

import torch

from megatron_attnedit.device.repair import Repair


@Repair
def counts_of_tokens_on_the_host(repair: Repair, kind: str) -> None:
    """Mcore brings them there from CUDA only, and all_to_all then gets a tensor for its sizes."""
    if kind != "cpu":
        return
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def counts_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if isinstance(tensor, torch.Tensor):
            return tensor.numpy() if as_numpy else tensor
        return tensor

    for module in (moe_utils, token_dispatcher):
        repair.replace(module, "maybe_move_tensor_to_cpu", by=counts_to_host)


@Repair
def unequal_parts_over_gloo(repair: Repair, kind: str) -> None:
    """Expert dispatch gathers and scatters parts of unequal sizes, and gloo those of one size."""
    if kind != "cpu":
        return
    from megatron.core.tensor_parallel import mappings

    gather = repair.original(mappings, "_gather_along_first_dim")
    scatter = repair.original(mappings, "_reduce_scatter_along_first_dim")

    def gather_padded(
        x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        """Padded to the longest."""
        if sizes is None or group.size() == 1:
            return gather(x, group, sizes, use_global_buffer)
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
        out = x.new_empty(longest * len(sizes), *x.shape[1:])
        torch.distributed.all_gather_into_tensor(out, padded, group=group)
        return torch.cat([p[:n] for p, n in zip(out.split(longest), sizes, strict=True)])

    def scatter_padded(
        x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        """As ``gather_padded``."""
        if sizes is None or group.size() == 1:
            return scatter(x, group, sizes, use_global_buffer)
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(n) for n in sizes])[group.rank()].contiguous()

    repair.replace(mappings, "_gather_along_first_dim", by=gather_padded)
    repair.replace(mappings, "_reduce_scatter_along_first_dim", by=scatter_padded)


@Repair
def random_state_of_the_cpu(repair: Repair, kind: str) -> None:
    """Mcore's trackers of random numbers keep a CUDA device's states."""
    if kind != "cpu":
        return
    from megatron.core.tensor_parallel import random

    def get(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def put(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    repair.replace(random, "_get_cuda_rng_state", by=get)
    repair.replace(random, "_set_cuda_rng_state", by=put)


ON_A_CPU = (counts_of_tokens_on_the_host, unequal_parts_over_gloo, random_state_of_the_cpu)
