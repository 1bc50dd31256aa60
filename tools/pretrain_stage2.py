#!/usr/bin/env python3
"""Stage 2, model-level: the student learns the teacher's next-token distributions (torchrun)."""

import sys

from megatron_attnedit.errors import run_tool
from megatron_attnedit.logs import start_logging


def main() -> None:
    start_logging()
    # Inside, because it takes seconds, in which a signal must end the program without a traceback.
    from megatron_attnedit.device import bootstrap

    bootstrap()
    from megatron_attnedit.training.dry_run import dry_run
    from megatron_attnedit.training.recipe import Stage2Recipe
    from megatron_attnedit.training.recipe_files import parse_recipe
    from megatron_attnedit.training.run import run

    if "--dry-run" in sys.argv:
        dry_run(Stage2Recipe, __doc__)
        return
    sys.exit(run(parse_recipe(Stage2Recipe, __doc__)))


if __name__ == "__main__":
    run_tool(main)
