"""A copy of the repository's root in which the training tools are a stand-in."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "ATTNEDIT_ENV": "cpu", "ATTNEDIT_DEVICES": "2"}


def root_with_stand_in(folder: Path) -> Path:
    """Links to what the launchers need, and ``recipe.yaml``."""
    (folder / "tools").mkdir(parents=True)
    for name in ("examples", "megatron_attnedit", "tools/launch.py"):
        (folder / name).symlink_to(ROOT / name)
    for stage in (1, 2):
        stand_in = ROOT / "tests" / "slurm" / "stand_in.py"
        (folder / "tools" / f"pretrain_stage{stage}.py").symlink_to(stand_in)
    (folder / "recipe.yaml").write_text("{}\n")
    return folder


def journal(save: Path) -> list[tuple[str, int]]:
    """What happened at which iteration, in order."""
    lines = (save / "journal.jsonl").read_text().splitlines()
    return [(line["what"], line["iteration"]) for line in map(json.loads, lines)]


def kept_iterations(events: list[tuple[str, int]]) -> list[int]:
    """Iterations in the weights at the end: those after the last save before a start are lost."""
    kept: list[int] = []
    for what, iteration in events:
        if what == "started":
            del kept[iteration:]
        elif what == "trained":
            kept.append(iteration)
    return kept


def bash(folder: Path, *words: object, **variables: str) -> subprocess.Popen:
    """Start a script there."""
    return subprocess.Popen(
        ["bash", *map(str, words)],
        cwd=folder,
        env={**ENVIRONMENT, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
