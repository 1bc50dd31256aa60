"""A SLURM of this machine alone, and jobs that are ended with the test."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launching import ENVIRONMENT, ROOT, root_with_stand_in
from tests.support.slurm_jobs import Job

TRAIN = "examples/slurm/train.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of a running SLURM."""
    folder = tmp_path_factory.mktemp("slurm")
    for parent in folder.parents[:2]:
        parent.chmod(0o755)  # munge's own user passes through
    script = ROOT / "tests" / "slurm" / "local_slurm.sh"
    subprocess.run(["bash", script, "start", folder], check=True)
    yield {**ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", script, "stop", folder], check=True)


@pytest.fixture
def submit(cluster, tmp_path) -> Iterator:
    jobs = []

    def start(
        *words: object,
        options=(),
        root: Path | None = None,
        template="examples/slurm/train.sbatch",
        **variables: str,
    ) -> Job:
        root = root or root_with_stand_in(tmp_path / "root")
        jobs.append(Job(root, {**cluster, **variables}, options, template, words))
        return jobs[-1]

    yield start
    for job in jobs:
        job.run("scancel", "--quiet", job.id)
