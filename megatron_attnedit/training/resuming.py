"""Before the first iteration of an attempt: where an earlier one has got to, if there was one."""

import dataclasses
import logging

import torch.distributed as dist

from megatron_attnedit.checkpoint import run_folder, sharded_state
from megatron_attnedit.convert.output import on_first
from megatron_attnedit.files import write_output
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.training.metrics import MetricsLog, Sink
from megatron_attnedit.training.optimizer import fitted, trains_anything
from megatron_attnedit.training.random_state import set_own_state
from megatron_attnedit.training.recipe_files import to_yaml
from megatron_attnedit.training.run_state import Run
from megatron_attnedit.training.weights_and_biases import WeightsAndBiases

logger = logging.getLogger(__name__)


def start_or_resume(run: Run) -> None:
    """Put the run's folder in order, load the last good checkpoint there is, open the logs.

    Raises:
        UserError: the folder holds another run, or no checkpoint in it is good.
    """
    is_first = dist.get_rank() == 0
    on_first(lambda: run_folder.make(run.directory), f"--save {run.directory}")
    _load(run)
    recipe = run.recipe
    others: list[Sink] = []
    if is_first:
        write_output(run.directory / "recipe.yaml", to_yaml(recipe))
        if recipe.wandb_project:
            config = dataclasses.asdict(recipe)
            project, name = recipe.wandb_project, recipe.wandb_exp_name
            others.append(WeightsAndBiases(run.directory, project, name, config))
    run.log = MetricsLog(
        run.directory,
        enabled=is_first,
        stage=run.stage.number,
        train_iters=recipe.train_iters,
        start_iteration=run.iteration,
        tokens_per_iteration=recipe.global_batch_size * recipe.seq_length,
        flops_per_token=run.flops_per_token,
        others=others,
    )


def _load(run: Run) -> None:
    found = run_folder.last_good(run.directory)
    if found is None:
        return
    before = read_lineage(found)
    run.lineage.refuse_other(before, where=str(found))
    if [*before.data.values()] != [*run.lineage.data.values()]:
        logger.warning("warning: %s was trained on other data: the order of samples is new", found)
    # A fresh optimizer's state is built by mcore while the sharded state is made.
    loaded = sharded_state.load(found, run.sharded_state(is_loading=True))
    if trains_anything(run.stage.models):
        run.optimizer.load_state_dict(fitted(loaded["optimizer"], run.optimizer))
    run.schedule.load_state_dict(loaded["schedule"])
    run.health.load(loaded["health"])
    run.iteration = loaded["iteration"]
    states = loaded["random_states"]
    if len(states) == dist.get_world_size():
        set_own_state(states[dist.get_rank()])
    else:
        logger.warning("warning: written by %d processes: random generators restart", len(states))
    logger.info("continuing from %s", found)
