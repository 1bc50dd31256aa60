"""What of a teacher can be recorded."""

from types import SimpleNamespace

import pytest

from megatron_attnedit.models.teacher import can_be_captured

GROUPED = {"num_moe_experts": 8, "moe_grouped_gemm": True}


@pytest.mark.parametrize(
    "fields, possible",
    [
        ({}, True),
        ({"num_moe_experts": 8}, False),
        (GROUPED, True),
        (GROUPED | {"transformer_impl": "transformer_engine"}, False),
        ({"transformer_impl": "transformer_engine"}, True),
        (GROUPED | {"expert_model_parallel_size": 2}, False),
        (GROUPED | {"expert_tensor_parallel_size": 2}, False),
        ({"tensor_model_parallel_size": 2}, True),
        (GROUPED | {"tensor_model_parallel_size": 2}, False),
        ({"virtual_pipeline_model_parallel_size": 2}, False),
        ({"context_parallel_size": 2}, False),
    ],
)
def test_what_can_be_recorded(fields, possible):
    usual = {
        "num_moe_experts": None,
        "moe_grouped_gemm": False,
        "transformer_impl": "local",
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
    }
    assert can_be_captured(SimpleNamespace(**usual | fields)) == possible
