"""Tasks of lm-evaluation-harness; the only file that imports it."""

import contextlib
import copy
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_attnedit.errors import UserError, one_line
from megatron_attnedit.evaluate.mean import mean_and_error
from megatron_attnedit.evaluate.tasks.answers import Answers, LocalModel, Server
from megatron_attnedit.evaluate.tasks.scores import Score

PACKAGE = "lm-eval"
# For scores that are no mean of their items.
BOOTSTRAP_ITERATIONS = 1000
# Of the examples in front of a question: the harness's own.
FEWSHOT_SEED = 1234
ROUNDING = 1e-9


def version() -> str:
    """Of the harness.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--tasks: lm-eval is not installed; pip install 'megatron-attnedit[eval]'"
        ) from None


def load_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """Tasks with their data, before any model is there.

    Args:
        names: Of tasks, groups or tags.
        folder: With tasks of one's own as the harness describes them in YAML; a relative file
            in them is one of this folder. They come first.

    Raises:
        UserError: the harness is not installed, a task is not known, or its data is not there.
    """
    version()
    # It warns of every model that it did not load itself.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    if folder and not folder.is_dir():
        raise UserError(f"--tasks-path {folder}: no such folder")
    include = str(folder.resolve()) if folder else None
    manager = TaskManager(include_path=include, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            where = f" in {folder} or" if folder else ""
            raise UserError(f"--tasks {name}: no such task{where} in lm-eval {version()}")
    with _inside(folder):
        for name in names:
            try:
                manager.load([name])
            except Exception as error:  # of many kinds: no network, no file, a field that is none
                raise UserError(f"--tasks {name}: cannot be loaded: {one_line(error)}") from error
        try:
            return manager.load(list(names))
        except Exception as error:  # one task in two of the names
            raise UserError(f"--tasks {','.join(names)}: {one_line(error)}") from error


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    before = Path.cwd()
    try:
        if folder:
            os.chdir(folder)
        yield
    finally:
        os.chdir(before)


def run(
    tasks: Any, answers: Answers, tokenizer: Any, limit: int | None, chat_template: bool
) -> list[Score]:
    """Every measure of every task.

    Args:
        tasks: What ``load_tasks`` gave.
        answers: The model, or the server that has it.
        tokenizer: The teacher's.
        limit: Items of a task; None for all.
        chat_template: Put every question through the tokenizer's chat template.

    Raises:
        UserError: the harness cannot run a task.
    """
    from lm_eval import evaluate

    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        found = evaluate(
            _language_model(answers, tokenizer),
            tasks,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    except Exception as error:  # a task's own code, or a server's answer
        names = ",".join(tasks["tasks"])
        raise UserError(f"--tasks {names}: cannot be run: {one_line(error)}") from error
    return [score for task in found["results"] for score in _scores(found, task)]


def _language_model(answers: Answers, tokenizer: Any) -> Any:
    if isinstance(answers, Server):
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        added = tokenizer("", verbose=False)["input_ids"]
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return LocalCompletionsAPI(
                base_url=f"{answers.url}/completions",
                model=answers.model,
                tokenizer_backend="huggingface",
                tokenizer=folder,
                add_bos_token=added == [tokenizer.bos_token_id],
                batch_size=answers.batch_size,
                max_length=answers.max_length,
            )
    from lm_eval.models.huggingface import HFLM

    assert isinstance(answers, LocalModel)
    # It sets the tokenizer's padding.
    return HFLM(
        answers.model,
        backend="causal",
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=answers.batch_size,
    )


def _scores(found: Any, task: str) -> Iterator[Score]:
    """Of one task, or of a group, whose items are those of its tasks."""
    parts = found.get("group_subtasks", {}).get(task) or [task]
    samples = [sample for part in parts for sample in found["samples"].get(part, ())]
    better = found["higher_is_better"].get(task) or {}
    for name, value in found["results"][task].items():
        metric, separator, filtered = name.partition(",")
        if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        values = [sample.get(metric) for sample in samples if sample["filter"] == filtered]
        stderr = found["results"][task].get(f"{metric}_stderr,{filtered}")
        yield Score(
            task,
            metric if filtered == "none" else f"{metric} ({filtered})",
            len(values),
            float(value),
            float(stderr) if isinstance(stderr, int | float) else None,
            _values_of_mean(values, value),
            higher_is_better=better.get(metric) is not False,
        )


def _values_of_mean(values: Sequence[Any], score: float) -> list[float] | None:
    """The items' values as numbers, if the score is their mean."""
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    numbers = [float(value) for value in values]
    is_mean = abs(mean_and_error(numbers)[0] - score) <= ROUNDING * max(1.0, abs(score))
    return numbers if is_mean else None
