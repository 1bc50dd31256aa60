"""A model's vocabulary is its tokenizer's, rounded up."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_attnedit.data.datasets import build_datasets
from megatron_attnedit.errors import UserError


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "accepted"),
    [
        (100015, 102400, True),  # deepseek-llm-7b-base
        (151669, 151936, True),  # Qwen3
        (32000, 32000, True),
        (49152, 49152 + 1023, True),
        (100015, 151936, False),  # DeepSeek's data, Qwen3's model
        (32000, 49152, False),
        (128256, 128255, False),  # a token that the model does not have
    ],
)
def test_padding_of_a_vocabulary(config, prefix, tmp_path, tokens, vocab_size, accepted):
    """As much as public models pad is accepted; another tokenizer is not."""
    copy = tmp_path / "copy"
    for suffix in (".bin", ".idx"):
        shutil.copyfile(prefix + suffix, f"{copy}{suffix}")
    description = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{copy}.json").write_text(json.dumps({**description, "vocab_size": tokens}))
    changes = {"train_data_path": [str(copy)], "vocab_size": vocab_size}
    if accepted:
        assert build_datasets(config(**changes), train_samples=2, valid_samples=0)[0][0]
        return
    with pytest.raises(UserError, match=f"{copy}: .*vocabulary does not match"):
        build_datasets(config(**changes), train_samples=2, valid_samples=0)
