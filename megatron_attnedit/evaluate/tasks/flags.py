"""The flags of all tasks, and what can be refused before anything is loaded or imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.tasks import catalogue


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of tasks; none of them runs by default."""
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", metavar="A,B", help="of lm-evaluation-harness, with the extra eval")
    add(
        "--tasks-path",
        type=Path,
        metavar="DIR",
        help="with tasks of your own in YAML; Python functions that they name are run",
    )
    add("--limit", type=int, metavar="N", help="items of each of --tasks (default: all)")
    add(
        "--generated-tasks",
        metavar="A,B",
        help=f"made from --text: all or some of {', '.join(catalogue.NAMES)}",
    )
    add(
        "--task-lengths",
        metavar="N,N",
        help="tokens of prompt and answer in generated tasks of any length (default: 1024, 2048 "
        "and so on up to the models' positions)",
    )
    add(
        "--task-samples",
        type=int,
        default=100,
        metavar="N",
        help="questions of a generated task, at each length (default: %(default)s)",
    )
    add("--task-seed", type=int, default=0, metavar="N", help="of their questions (default: 0)")
    add(
        "--apply-chat-template",
        action="store_true",
        help="put the questions of all tasks through the tokenizer's chat template",
    )
    add(
        "--server",
        action="append",
        default=[],
        metavar="[NAME=]URL",
        help="a running server (OpenAI's completions interface) that answers the tasks for the "
        "student of this name, for teacher, or for the only student; repeatable",
    )


def check_flags(args: argparse.Namespace, students: Sequence[str]) -> None:
    """Refuse what makes no tasks, before anything is loaded.

    Args:
        args: Of ``add_flags``.
        students: Their names.

    Raises:
        UserError: names the flag.
    """
    for flag, value in (("--limit", args.limit), ("--task-samples", args.task_samples)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    given = {"--limit": args.limit, "--tasks-path": args.tasks_path}
    for flag, value in given.items():
        if value is not None and args.tasks is None:
            raise UserError(f"{flag} {value}: needs --tasks")
    if args.generated_tasks is None and args.task_lengths is not None:
        raise UserError(f"--task-lengths {args.task_lengths}: needs --generated-tasks")
    if args.generated_tasks is not None:
        catalogue.parse_names(args.generated_tasks)
    lengths_of(args.task_lengths)
    named = parse_servers(args.server, students)
    if (named or args.apply_chat_template) and not wanted(args):
        flag = "--server" if named else "--apply-chat-template"
        raise UserError(f"{flag}: needs --tasks or --generated-tasks")


def wanted(args: argparse.Namespace) -> bool:
    """Is there any task?"""
    return args.tasks is not None or args.generated_tasks is not None


def lengths_of(text: str | None) -> list[int] | None:
    """Numbers between commas, the smallest first.

    Raises:
        UserError: they are none.
    """
    if text is None:
        return None
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise UserError(f"--task-lengths {text}: expected positive whole numbers between commas")
    return found


def parse_servers(texts: Sequence[str], students: Sequence[str]) -> dict[str, str]:
    """From the name of a model to its server's URL.

    Raises:
        UserError: a name that is none of the models', or given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, separator, url = text.partition("=")
        if not separator or "://" in name:
            if len(students) > 1:
                raise UserError(f"--server {text}: of which model? NAME={text}")
            name, url = students[0], text
        if name not in ("teacher", *students):
            names = ", ".join(["teacher", *students])
            raise UserError(f"--server {text}: {name} is none of {names}")
        if name in found:
            raise UserError(f"--server {text}: {name} is given twice")
        found[name] = url
    return found
