"""Apply a table of rows: fill a Megatron model from Hugging Face files."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_attnedit.convert.completeness import check_finite
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.weight_mapping import ParamMapping, TensorParallelPlace
from megatron_attnedit.errors import UserError


@torch.no_grad()
def hf_to_megatron(
    reader: HFReader,
    rows: Sequence[ParamMapping],
    params: Mapping[str, Tensor],
    *,
    ignored: Mapping[str, str],
    place: TensorParallelPlace,
    progress: bool = False,
) -> None:
    """Fill this rank's parameters from a Hugging Face directory.

    Args:
        reader: The source.
        rows: The table of the whole model; rows of other pipeline stages are skipped.
        params: This rank's parameters under their global names; filled in place.
        ignored: Patterns of source tensors that are left out, with the reason.
        place: Which shards this rank holds.
        progress: Show a progress bar.

    Raises:
        UserError: the source does not fit the table, or holds NaN or Inf.
    """
    reader.check(rows, ignored)
    by_name = {row.megatron_param: row for row in rows}
    assert params.keys() <= by_name.keys(), f"no row for {params.keys() - by_name.keys()}"
    total = sum(param.nbytes for param in params.values())
    with tqdm(desc="load", total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, param in params.items():
            row = by_name[name]
            shard = row.read_shard(reader.slice, place)
            check_finite(shard, where=str(reader.directory), name=", ".join(row.hf_params))
            assert shard.shape == param.shape, f"{name}: {shard.shape} into {param.shape}"
            param.copy_(shard)
            bar.update(param.nbytes)


def check_tensor_parallel(config: HFConfig, tp_size: int) -> None:
    """Refuse a tensor-parallel size that cannot cut the model.

    Raises:
        UserError: names the flag and the field of ``config.json``.
    """
    flag = f"--tensor-model-parallel-size {tp_size}"
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % tp_size:
        raise UserError(f"{flag} does not divide num_attention_heads {heads} of {config.path}")
    if groups % tp_size and tp_size % groups:
        raise UserError(
            f"{flag} neither divides nor is a multiple of num_key_value_heads {groups} "
            f"of {config.path}"
        )
    rows = (heads + 2 * groups) * config.head_dim
    if rows % tp_size:  # mcore cuts them like any others, also where groups are fewer
        raise UserError(
            f"{flag} does not divide the {rows} rows of queries, keys and values "
            f"((num_attention_heads {heads} + 2 times num_key_value_heads {groups}) times head_dim "
            f"{config.head_dim}) of {config.path}"
        )
    names = ["hidden_size"] if config.num_experts else ["hidden_size", "intermediate_size"]
    for name in names:
        if getattr(config, name) % tp_size:
            raise UserError(f"{flag} does not divide {name} {getattr(config, name)}")
