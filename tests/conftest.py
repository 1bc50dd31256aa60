"""One thread, a prepared Megatron, and a tiny world of one process for every test."""

import functools
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from megatron_attnedit.device import bootstrap

pytest_plugins = ["tests.support.tokenizers", "tests.support.chat", "tests.support.hf_students"]

torch.set_num_threads(1)
bootstrap()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also what takes minutes")
    parser.addoption(
        "--parallel-figures", type=Path, help="keep the differences between grids in this file"
    )


def pytest_configure(config):
    if config.getoption("--full"):
        config.option.markexpr = "not gpu"
        os.environ["MEGATRON_ATTNEDIT_FULL_TESTS"] = "1"  # worker processes see it, too


def pytest_collection_modifyitems(items):
    """The files with long tests first: the last ones leave one of two workers idle."""
    items.sort(key=lambda item: "numerics" not in item.path.parts)


@pytest.fixture
def one_process(tmp_path):
    """Megatron's groups in this process alone."""
    from tests.support.models import start_megatron
    from tests.support.processes import process_group

    with process_group(0, 1, str(tmp_path / "store")):
        start_megatron()
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny bfloat16 models of four layers by family and tying, made once; not to be changed."""
    from tests.support.models import tiny_hf_dir

    @functools.cache
    def model(family, tied=False):
        folder = tmp_path_factory.mktemp(family) / "hf"
        return tiny_hf_dir(
            folder, family, tie_word_embeddings=tied, dtype="bfloat16", num_hidden_layers=4
        )

    return model
