"""Save and load on Megatron's distributed checkpoints; any grid reads what any grid wrote.

Layout: ``DIR/iter_0000100/`` (tensors, ``attnedit.json``) and ``DIR/latest_checkpointed_iteration
.txt``. A checkpoint is written under a temporary name and renamed when it is complete. Frozen
weights are not written again: a student's checkpoint holds what trained and names its teacher.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule

from megatron_attnedit.convert.completeness import check_finite
from megatron_attnedit.convert.dist_metadata import read_metadata
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.teacher import global_name
from megatron_attnedit.training.lineage import FILE, Lineage

EXTRA_STATE = "_extra_state"
TRACKER = "latest_checkpointed_iteration.txt"


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
    return ((name, sharded) for name, sharded in state.items() if not name.endswith(EXTRA_STATE))


def iteration_dir(directory: Path, iteration: int) -> Path:
    """Folder of one iteration's checkpoint."""
    return directory / f"iter_{iteration:07d}"


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint in ``directory``, or the directory itself if it is one."""
    path = Path(directory)
    if (path / FILE).is_file():
        return path
    found = tracked(path)
    if found is not None and not (found / FILE).is_file():
        raise UserError(f"{path / TRACKER}: names {found.name}, which is missing or incomplete")
    return found


def tracked(directory: Path) -> Path | None:
    """The folder that the tracker file names, there or not; None without a tracker.

    Raises:
        UserError: it names none.
    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text == "release":  # Megatron's name for a model that no run wrote
        return directory / text
    if not text.isdecimal():
        raise UserError(f"{tracker}: names no iteration")
    return iteration_dir(directory, int(text))


def find(directory: str, flag: str) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    found = latest(directory)
    if found is None:
        raise UserError(f"{flag} {directory}: no checkpoint there ({TRACKER} is missing)")
    return found


def save(directory: Path, iteration: int, state: dict[str, Any], lineage: Lineage) -> Path:
    """Write a checkpoint and make it the latest; collective.

    Args:
        directory: The run's folder.
        iteration: Iterations done.
        state: Sharded tensors and plain values.
        lineage: Written beside them.
    """
    target = iteration_dir(directory, iteration)
    partial = directory / f".writing-{target.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({**state, "iteration": iteration}, partial, content_metadata=CONTENT)
    if dist.get_rank() == 0:
        lineage.write(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        tracker = directory / f".{TRACKER}"
        tracker.write_text(f"{iteration}\n")
        tracker.rename(directory / TRACKER)
    dist.barrier()
    return target


def load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint into the shape of ``state``; collective.

    Raises:
        UserError: it does not fit, or is damaged.
    """
    try:
        read_metadata(path)  # before Megatron unpickles it without looking
        return dist_checkpointing.load(state, str(path))
    except (CheckpointingException, KeyError, OSError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0][:300]
        raise UserError(f"{path}: cannot be loaded: {first_line}") from None


def load_params(path: Path, module_state: dict[str, Any]) -> None:
    """Fill a model's own tensors from a checkpoint, and check that none is left out."""
    params = {name: sharded.data for name, sharded in module_state.items() if _holds(sharded)}
    loaded = load(path, module_state)
    with torch.no_grad():
        for name, param in params.items():
            if loaded[name] is not param:
                param.copy_(loaded[name])
            check_finite(param, where=str(path), name=name)


def _holds(sharded: Any) -> bool:
    return isinstance(getattr(sharded, "data", None), torch.Tensor)


