"""What a checkpoint holds, and how it is read; any layout reads what any layout wrote.

The format is Megatron's ``torch_dist``. Frozen weights are not written again: a student's
checkpoint holds what trained and names its teacher.
"""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from megatron_attnedit.convert.completeness import check_finite
from megatron_attnedit.convert.dist_metadata import read_metadata
from megatron_attnedit.convert.verification import verified
from megatron_attnedit.errors import UserError, one_line
from megatron_attnedit.models.teacher import global_name

EXTRA_STATE = re.compile(r"_extra_state\d*")  # one for each of grouped experts
COMMON = "common.pt"  # Megatron's name of the file of plain values
_DAMAGED = (
    CheckpointingException,
    *(KeyError, OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError),
    *(AssertionError, pickle.UnpicklingError),
)

# How tensors are cut into a checkpoint.
CONTENT = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def metadata() -> dict[str, Any]:
    """``CONTENT``, and the group that shares a model."""
    return {
        **CONTENT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Sharded tensors of this rank's pieces of a model, under their names in the whole model."""
    return {
        global_name(chunk, name): sharded
        for chunk in chunks
        for name, sharded in _tensors(chunk.sharded_state_dict(metadata=metadata()))
    }


def attention_state(attentions: Mapping[int, MegatronModule]) -> dict[str, Any]:
    """Sharded tensors of the edited attentions, under their names in the whole model."""
    state: dict[str, Any] = {}
    for layer_idx, module in attentions.items():
        prefix = f"decoder.layers.{layer_idx}.self_attention."
        state.update(_tensors(module.sharded_state_dict(prefix, (), metadata())))
    return state


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Without Transformer Engine's extra state, which is empty here."""
    for name, sharded in state.items():
        if not EXTRA_STATE.fullmatch(name.rpartition(".")[2]):
            yield name, sharded


def load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint into the shape of ``state``, and the model's own tensors; collective.

    Most of those are loaded in place; of what is stored in another layout, such as grouped
    experts, Megatron loads copies.

    Args:
        path: The iteration's folder.
        state: ``model`` in it is of sharded tensors, by name.

    Raises:
        UserError: it does not fit, is damaged, or holds pickled objects.
    """
    params = _own_tensors(state["model"])  # loading replaces them in the state
    loaded = _load(path, state)
    with torch.no_grad():
        for name, param in params.items():
            if loaded["model"][name] is not param:
                param.copy_(loaded["model"][name])
    return loaded


def _load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    read_metadata(path, tensors_only=True)  # before Megatron unpickles it without looking
    try:
        return dist_checkpointing.load(state, str(path))
    except CheckpointException as error:
        cause: BaseException = next(iter(error.failures.values()))[0]
    except _DAMAGED as error:
        cause = error
    raise UserError(f"{path}: cannot be loaded: {one_line(cause, 300)}")


def load_params(path: Path, module_state: dict[str, Any]) -> None:
    """Fill a model's own tensors from a checkpoint; it is verified, and none is left out.

    Raises:
        UserError: see ``load``; or a file is not as it was written.
    """
    params = _own_tensors(module_state)
    with verified(path):
        load(path, {"model": module_state})
    for name, param in params.items():
        check_finite(param, where=str(path), name=name)


def _own_tensors(module_state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: sharded.data for name, sharded in module_state.items() if _holds(sharded)}


def _holds(sharded: Any) -> bool:
    return isinstance(getattr(sharded, "data", None), torch.Tensor)
