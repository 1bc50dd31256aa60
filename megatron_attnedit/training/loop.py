"""The training loop: the same for both stages."""

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core import parallel_state

from megatron_attnedit.data.datasets import Batch
from megatron_attnedit.device import LateNumbers
from megatron_attnedit.training.health import BAD_LOSS, FINE, agree, bad_gradient, queue_agreement
from megatron_attnedit.training.heartbeat import FAILED, FINISHED, STOPPED
from megatron_attnedit.training.random_state import gather_states
from megatron_attnedit.training.resuming import start_or_resume
from megatron_attnedit.training.run_state import Run
from megatron_attnedit.training.update import apply_update, prepare_update

logger = logging.getLogger(__name__)

POLL_S = 0.2
AT_ONCE = "received SIGINT twice: ended at once; the last good checkpoint is kept"


def train(run: Run) -> str:
    """Train to the last iteration, or until there is a reason to stop.

    Returns:
        The reason; empty at the end. In both cases the last checkpoint is that of now.

    Raises:
        UserError: see ``health``; or a checkpoint cannot be written.
    """
    recipe, reason = run.recipe, ""
    start_or_resume(run)
    num_microbatches = recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    train_batches = run.batches(run.train_data, run.iteration * recipe.global_batch_size)
    run.stopping.before_end = lambda: run.heartbeat.beat(run.iteration, FAILED, AT_ONCE)
    with run.stopping:
        if run.iteration == 0:
            validate(run)
        while run.iteration < recipe.train_iters and not reason:
            step(run, train_batches, num_microbatches)
            last = run.iteration == recipe.train_iters
            reason = "" if last else run.stopping.reason(run.stop_code, run.iteration)
            if last or run.iteration % recipe.eval_interval == 0:
                validate(run)
            judged = run.judging.is_due(run.iteration)
            if last or reason or judged or run.iteration % recipe.save_interval == 0:
                save(run)
            run.writer.poll()
            if not reason:
                run.judging.ask(run.iteration)
                run.log.tasks(run.iteration, run.judging.poll())
            run.check_owner()
            run.heartbeat.beat(run.iteration)
        run.writer.finish()
        if recipe.eval_tasks_interval and not reason:
            wait_for_tasks(run)
        run.log.close()
        run.heartbeat.beat(run.iteration, STOPPED if reason else FINISHED, reason)
    if reason:
        logger.info("stopped after iteration %d: %s", run.iteration, reason)
    return reason


def step(run: Run, train_batches: Iterator[Batch], num_microbatches: int) -> None:
    """One iteration. All is queued before the first look at a number, which waits for all."""
    run.optimizer.zero_grad()
    metrics = run.stage.train_step(train_batches, num_microbatches)
    squares = prepare_update(run.optimizer)
    run.check_owner()
    agreed = queue_agreement(bad_gradient(run.stage.models), run.stopping.code())
    is_bad, run.stop_code = agreed.tolist()
    verdict = run.health.judge(metrics["loss"], bool(is_bad))
    if verdict == FINE:
        update(run, metrics, squares)
    else:
        skip(run, verdict, metrics["loss"])
    run.log.step()


def update(run: Run, metrics: Mapping[str, Any], squares: LateNumbers | None) -> None:
    """Apply the gradients."""
    run.health.accept(metrics["loss"])
    lr = run.optimizer.param_groups[0]["lr"]
    grad_norm = apply_update(run.optimizer, squares)
    run.schedule.step(increment=1)
    run.iteration += 1
    if run.iteration % run.recipe.log_interval == 0 or run.iteration == run.recipe.train_iters:
        run.log.train(run.iteration, {**metrics, "lr": lr, "grad_norm": grad_norm})


def skip(run: Run, verdict: int, loss: float) -> None:
    """Leave everything as it is and continue with the next batch, or stop."""
    what = run.health.describe(verdict, loss)
    if verdict == BAD_LOSS:
        what += f", {run.stage.locate_nonfinite()}"
    run.writer.finish()
    run.health.reject(what, run.iteration + 1)
    run.iteration += 1
    run.log.skipped(run.iteration, run.health.skipped, what)


def wait_for_tasks(run: Run) -> None:
    """Until the last judgement has ended, or a signal comes; ranks wait together."""
    started, busy, code = time.monotonic(), 1, 0
    while busy and not code:
        if figures := run.judging.poll():
            waited = round(time.monotonic() - started, 3)
            run.log.tasks(run.iteration, {**figures, "tasks_waited_seconds": waited})
        busy, code = agree(int(run.judging.is_busy), run.stopping.code())
        time.sleep(busy * POLL_S)


def validate(run: Run) -> None:
    """Losses on the first ``eval_iters`` global batches of the validation data."""
    if run.valid_data is None:
        return
    rounds = run.recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    metrics = run.stage.validate(run.batches(run.valid_data, 0), rounds * run.recipe.eval_iters)
    run.log.validation(run.iteration, dict(metrics))


def save(run: Run) -> None:
    """Write a checkpoint, or begin to."""
    run.check_owner()
    states = gather_states()
    run.log.sync()
    run.writer.save(run.iteration, run.sharded_state(is_loading=False), {"random_states": states})
