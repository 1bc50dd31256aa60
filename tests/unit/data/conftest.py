"""Token files, and a function that makes a configuration of them."""

import json

import pytest

from megatron_attnedit.data.datasets import DataConfig
from megatron_attnedit.data.preprocess import PreprocessConfig, preprocess
from megatron_attnedit.data.tokenizer import load_tokenizer
from tests.support.tokenizers import corpus

SEQ = 32


@pytest.fixture(scope="session")
def make_data(tmp_path_factory, hf_tokenizer):
    """A function that tokenizes texts and returns the prefix."""

    def make(name, texts, **options):
        folder = tmp_path_factory.mktemp(name)
        source = folder / "a.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = {"tokenizer": hf_tokenizer, **options}
        prefix = str(folder / name)
        preprocess(PreprocessConfig(inputs=[str(source)], output=prefix, **options))
        return prefix

    return make


@pytest.fixture(scope="session")
def prefix(make_data):
    return make_data("words", corpus(200))


@pytest.fixture
def config(tmp_path, prefix, hf_tokenizer):
    """A function that makes a DataConfig for ``prefix`` with changes."""

    def make(**changes):
        defaults = {
            "train_data_path": [prefix],
            "seq_length": SEQ,
            "seed": 1,
            "vocab_size": load_tokenizer(hf_tokenizer).vocab_size,
            "data_cache_path": str(tmp_path / "cache"),
        }
        return DataConfig(**{**defaults, **changes})

    return make
