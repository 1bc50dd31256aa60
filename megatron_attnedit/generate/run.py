"""From prompts to a folder of completions, from where it was left."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_attnedit.data.bad_rows import STOP, BadRow, BadRows
from megatron_attnedit.data.conversations import parse_conversation
from megatron_attnedit.data.documents import expand_inputs
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import write_output
from megatron_attnedit.generate.card import card
from megatron_attnedit.generate.completions import CUT_OFF, STOPPED, Completion, Model, Task
from megatron_attnedit.generate.prompts import PromptCounts, read_prompts
from megatron_attnedit.generate.settings import Sampling
from megatron_attnedit.generate.store import CARD, DATA, Store

logger = logging.getLogger(__name__)

REPEATED, UNFINISHED = "same as another of its prompt", "cut off at --max-new-tokens"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to read and where to write.

    Attributes:
        prompts: Files, globs or ``hf:NAME`` of rows with messages.
        output: Folder.
        sampling: How completions are drawn.
        json_key: Key of the messages; None: the usual ones.
        limit: Most prompts; 0: all.
        on_bad_row: ``stop`` at the first row that is no prompt, or ``skip``.
    """

    prompts: list[str]
    output: str
    sampling: Sampling
    json_key: str | None = None
    limit: int = 0
    on_bad_row: str = STOP

    def __post_init__(self) -> None:
        BadRows(self.on_bad_row)  # refuses what is no policy
        if self.limit < 0:
            raise UserError(f"--limit {self.limit}: expected at least 0")


def generate(config: GenerateConfig, model: Model) -> dict[str, Any]:
    """Ask for every completion that is not there yet, then write the card.

    The caller holds the lock of the folder.

    Returns:
        Numbers: ``rows``, ``prompts``, ``duplicates``, and ``bad_rows`` and ``left_out`` by kind.

    Raises:
        UserError: bad prompts, a folder of other settings, or a server that is gone.
    """
    sources = expand_inputs(config.prompts, "--prompts")
    sampling, described = config.sampling.as_dict(), model.describe()
    bad_rows, counts = BadRows(config.on_bad_row), PromptCounts()
    folder = Path(config.output)
    store = Store(folder, {**described, **sampling})
    if store.done:
        logger.info("%s: continues after %d completions", folder / DATA, len(store.done))
    (folder / CARD).unlink(missing_ok=True)  # it is there when all the rest is
    tasks = _tasks(config, sources, bad_rows, counts, store)
    with store, tqdm(desc="generate", unit=" completions", initial=len(store.done)) as bar:
        for task, completion in model.complete(tasks):
            _put(store, task, completion, bad_rows)
            bar.update(1)
    if not counts.prompts:
        raise UserError(f"--prompts {' '.join(config.prompts)}: no prompts")
    found = {
        "rows": store.kept,
        "prompts": counts.prompts,
        "duplicates": counts.duplicates,
        "bad_rows": dict(bad_rows.counts),
        "left_out": dict(store.left_out),
    }
    text = card(model=described, sources=sources, sampling=sampling, counts=found)
    write_output(folder / CARD, text)
    return found


def _tasks(
    config: GenerateConfig,
    sources: list[str],
    bad_rows: BadRows,
    counts: PromptCounts,
    store: Store,
) -> Iterator[Task]:
    """The completions that are still to be asked for, in the order of the prompts."""
    for prompt in read_prompts(sources, config.json_key, bad_rows, counts, config.limit):
        for sample in range(config.sampling.samples):
            if (prompt.id, sample) not in store.done:
                yield Task(prompt, sample, config.sampling.seed_of(prompt.id, sample))


def _put(store: Store, task: Task, completion: Completion | BadRow, bad_rows: BadRows) -> None:
    """A row, or the reason why there is none.

    Raises:
        BadRow: the model refuses the prompt, and that stops.
    """
    prompt = task.prompt
    if isinstance(completion, BadRow):
        bad_rows.reject(completion)
        store.leave_out(prompt.id, task.sample, completion.kind)
        return
    row: dict[str, Any] = {"id": prompt.id, "sample": task.sample, "seed": task.seed}
    row["messages"] = [*prompt.messages, completion.message]
    if prompt.tools:
        row["tools"] = prompt.tools
    reason = ""
    if completion.finish_reason not in STOPPED:
        cut_off = completion.finish_reason == CUT_OFF
        reason = UNFINISHED if cut_off else f"ended by {completion.finish_reason[:40]}"
    elif store.is_repeated(row):
        reason = REPEATED
    else:
        try:
            parse_conversation(prompt.where, row)
        except BadRow as error:
            reason = error.kind
    if reason:
        store.leave_out(prompt.id, task.sample, reason)
    else:
        store.keep(row)
