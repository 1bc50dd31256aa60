"""What an adaptor is told must not change what Megatron is built from.

MindSpeed (branch core_r0.16.0) puts every option that it was told into every ``TransformerConfig``
whose caller does not set that field. A wrapper that does the same stands in for it.
"""

import dataclasses
import functools

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.device.ascend.adaptor import Adaptor
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.parallel_layout import ParallelConfig
from tests.support.models import tiny_hf_dir

LAYOUT = {"pipeline_model_parallel_layout": "Et|tttL", "pipeline_model_parallel_size": 2}
GRIDS = [
    {},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    LAYOUT,
    {"context_parallel_size": 2},
]
EXPERT_GRIDS = [{"expert_model_parallel_size": 2}]


@pytest.fixture
def told(monkeypatch):
    """Options that every configuration receives beneath its caller's."""
    options = {}
    init = TransformerConfig.__init__
    names = {field.name for field in dataclasses.fields(TransformerConfig)}

    @functools.wraps(init)
    def with_options(self, *args, **kwargs):
        beneath = {name: value for name, value in options.items() if name in names}
        init(self, *args, **{**beneath, **kwargs})

    monkeypatch.setattr(TransformerConfig, "__init__", with_options)
    return options


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_every_configuration_is_as_without_an_adaptor(told, tmp_path, family):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf", family, num_hidden_layers=4))
    adaptor = Adaptor("stand-in", told.update)
    for fields in GRIDS + (EXPERT_GRIDS if family == "qwen3_moe" else []):
        for flags in ({}, {"recompute": "full"}, {"moe_grouped_gemm": True}):
            parallel = ParallelConfig(**fields)
            told.clear()
            plain = transformer_config(hf, parallel, torch.bfloat16, **flags)
            adaptor.configure(vars(parallel))
            assert told["normalization"] == "RMSNorm"
            adapted = transformer_config(hf, parallel, torch.bfloat16, **flags)
            for field in dataclasses.fields(TransformerConfig):
                one, other = (getattr(config, field.name) for config in (plain, adapted))
                if field.name == "pipeline_model_parallel_layout" and one is not None:
                    one, other = one.layout, other.layout
                assert one == other, (family, fields, flags, field.name)


def test_a_layout_of_before_is_taken_back(told):
    """The options are kept in the adaptor's process; what is not said again would stay."""
    adaptor = Adaptor("stand-in", told.update)
    adaptor.configure(vars(ParallelConfig(**LAYOUT)))
    assert told["pipeline_model_parallel_layout"] == "Et|tttL"
    adaptor.configure(vars(ParallelConfig()))
    assert told["pipeline_model_parallel_layout"] is None
