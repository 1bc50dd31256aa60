"""The one exception that is the user's to fix, and how a tool reports it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line that names the file, field or flag."""


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool's ``main``; a ``UserError`` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
