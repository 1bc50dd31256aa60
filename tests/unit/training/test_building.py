"""What is captured as CUDA graphs."""

from types import SimpleNamespace

import pytest

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.training.building import masks_documents_by_flex
from tests.support.models import tiny_hf_dir


@pytest.mark.parametrize(
    ("attention", "flags", "expected"),
    [
        (MLA, {}, False),
        (GateSWA, {"sliding_window": 128}, False),
        (GateSWA, {"sliding_window": 1024}, True),
        (GateSWA, {"sliding_window": 128, "sink_tokens": 4}, True),
    ],
)
def test_documents_by_flex(tmp_path, attention, flags, expected):
    hf = read_hf_config(tiny_hf_dir(tmp_path))
    models = SimpleNamespace(attention=attention.from_flags(flags, hf), hf=hf)
    for masks, backend in ((True, "auto"), (False, "auto"), (True, "flex")):
        recipe = SimpleNamespace(reset_attention_mask=masks, attention_backend=backend)
        found = masks_documents_by_flex(recipe, models)
        assert found == (masks and (expected or backend == "flex"))
