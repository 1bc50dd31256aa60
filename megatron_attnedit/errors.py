"""The one exception that is the user's to fix, and how a tool reports it."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line that names the file, field or flag."""


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool's ``main``; a ``UserError`` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
