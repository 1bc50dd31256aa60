"""What the flags ask for, with its data, and who answers."""

import argparse
import random
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_attnedit.data.tokenizer import end_of_document
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.tasks import catalogue, harness
from megatron_attnedit.evaluate.tasks.answers import Answers, LocalModel, Server, reach
from megatron_attnedit.evaluate.tasks.flags import lengths_of, parse_servers
from megatron_attnedit.evaluate.tasks.judge import Asked
from megatron_attnedit.evaluate.tasks.long_tasks import LONG_TASKS
from megatron_attnedit.evaluate.tasks.source import Source, check_chat_template
from megatron_attnedit.evaluate.text import token_windows

WINDOW = 1024
# So much text is drawn from: this many windows, or times the longest prompt.
TIMES = 8


def load_early(args: argparse.Namespace, students: Sequence[str]) -> tuple[Any, dict[str, Server]]:
    """Tasks of the harness and servers, which cost little beside the models.

    Raises:
        UserError: one of them is not there.
    """
    urls = parse_servers(args.server, students)
    servers = {name: reach(url, args.batch_size) for name, url in urls.items()}
    if args.tasks is None:
        return None, servers
    return harness.load_tasks(args.tasks.split(","), args.tasks_path), servers


def check_template(args: argparse.Namespace, tokenizer: Any) -> None:
    """Refuse ``--apply-chat-template`` for a tokenizer without one.

    Raises:
        UserError: it has none.
    """
    if args.apply_chat_template:
        check_chat_template(tokenizer)


def answers_of(
    models: Mapping[str, Any], servers: Mapping[str, Server], tokenizer: Any, batch_size: int
) -> dict[str, Answers]:
    """Who answers for each model: its server, or the model in this process."""
    return {
        name: servers.get(name) or LocalModel(model, tokenizer, batch_size)
        for name, model in models.items()
    }


def asked(args: argparse.Namespace, harness_tasks: Any, tokenizer: Any, longest: int) -> Asked:
    """All tasks of the flags.

    Args:
        args: Of ``add_flags``, and ``text`` and ``json_key``.
        harness_tasks: What ``load_early`` gave.
        tokenizer: The teacher's.
        longest: Tokens that every model takes.

    Raises:
        UserError: a length is beyond that or beyond the text, or too short for a task, or the text
            has too few words.
    """
    template = args.apply_chat_template
    if args.generated_tasks is None:
        return Asked(harness_tasks, args.limit, template)
    names = catalogue.parse_names(args.generated_tasks)
    lengths = lengths_of(args.task_lengths) or catalogue.lengths_up_to(longest)
    if lengths[-1] > longest:
        raise UserError(f"--task-lengths {lengths[-1]}: the models take {longest} tokens")
    source = Source(tokenizer, _tokens(args, tokenizer, lengths[-1]), template)
    if not LONG_TASKS.keys() & set(names):
        lengths = []
    elif args.task_lengths is None:
        lengths = [length for length in lengths if length <= len(source.tokens)]
    elif lengths[-1] > len(source.tokens):
        tokens = len(source.tokens)
        raise UserError(f"--task-lengths {lengths[-1]}: --text {args.text} has {tokens} tokens")
    for name in names:
        if lengths and name in LONG_TASKS:
            make, new_tokens = LONG_TASKS[name]
            make(source, random.Random(0), lengths[0] - new_tokens)
    return Asked(
        harness_tasks,
        args.limit,
        template,
        source,
        names,
        lengths,
        args.task_samples,
        args.task_seed,
    )


def _tokens(args: argparse.Namespace, tokenizer: Any, longest: int) -> list[int]:
    """As much of the text as is drawn from, without ends of documents."""
    window = min(WINDOW, longest)
    count = TIMES * max(WINDOW, longest) // window
    windows = token_windows(args.text, tokenizer, window, count, args.json_key)
    end = end_of_document(tokenizer)
    return [token for token in windows[:, :-1].flatten().tolist() if token != end]


def longest_of(models: Mapping[str, Any], servers: Mapping[str, Server]) -> int:
    """Tokens that every model takes, through its server where it has one."""
    known = [model.config.max_position_embeddings for model in models.values()]
    known += [server.max_length for server in servers.values() if server.max_length]
    return min(known)
