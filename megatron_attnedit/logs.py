"""How the tools log."""

import logging
import sys


def start_logging() -> None:
    """This package's messages on stderr with the time; of others only warnings."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("megatron_attnedit").setLevel(logging.INFO)
