"""Dry-run conformance against torch_npu 2.13.0 (not on an NPU; ``docs/tutorials/ascend.md``).

The wheel is the real one, unmodified, on a stand-in for CANN; numbers are computed on the CPU.
"""

import inspect
import re

import pytest
import torch

from tests.ascend import dry_run, operators, packed, scenarios
from tests.support import processes
from tests.support.inputs import make_inputs, make_student

DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}
BF16 = {"bf16": True, "use_distributed_optimizer": True}


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    try:
        return dry_run.on_the_wheel()
    except dry_run.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def found(stand_in):
    return dry_run.run(stand_in, "operators")


def test_the_accelerator_is_an_npu(found):
    assert found["accelerator"] == ("npu:0", "hccl")


@pytest.mark.parametrize("name", scenarios.OPERATORS)
def test_schema(found, name):
    """Names, order and defaults that the documentation's meaning is written down for."""
    schema = found["schemas"][name]
    assert operators.SCHEMAS.get(name, schema) == schema
    inside = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    arguments = [a.strip().split(" ")[-1] for a in re.split(r",(?![^\[]*\])", inside)]
    names = {a.split("=")[0]: a.partition("=")[2] for a in arguments if a != "*"}
    for parameter in inspect.signature(getattr(operators, name)).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert parameter.name in names, (parameter.name, schema)
            if isinstance(parameter.default, int | float):
                assert float(names[parameter.name]) == float(parameter.default), schema


def test_shapes_by_the_wheels_own_meta_kernels(found):
    assert found["meta"] == {
        "mla": torch.Size([4096, 1, 32 * 128]),
        "window": torch.Size([4096, 1, 4096]),
        "rms_norm": torch.Size([6, 2, 64]),
        "swiglu": torch.Size([6, 2, 32]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(found, dtype):
    """Values and gradients against the formulas, through torch_npu's dispatch and autograd."""
    expected = scenarios.kernel_results(dtype)
    assert found[dtype].keys() == expected.keys()
    # In bfloat16 the formula's gradient is a sum of rounded parts.
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1.6e-2, 4e-3)
    for name, tensors in expected.items():
        for ours, theirs in zip(found[dtype][name], tensors, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", scenarios.ATTENTIONS)
def test_attention(found, name):
    """Values and gradients against the dense reference."""
    expected, _ = scenarios.attention_results("reference")
    for ours, theirs in zip(found["attention"][0][name], expected[name], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", scenarios.WITH_SINKS)
def test_sink_logits(found, name):
    """The operators called by hand: the softmax's size and the output that they are given."""
    expected = scenarios.sink_results("reference")
    for ours, theirs in zip(found["sink"][name], expected[name], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sinks", ["", " and sinks"])
@pytest.mark.parametrize("name", packed.WITH_DOCUMENTS)
def test_documents(found, name, sinks):
    """Laid end to end, with where each ends: both modes hold in each by itself."""
    results, calls = found["documents"]
    expected, _ = packed.document_results("reference")
    for ours, theirs in zip(results[name + sinks], expected[name + sinks], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    keys = [1, 10, 40, 80]
    queries = [0, 0, 16, 32] if "fewer" in name else keys
    forward, gradient = (
        next(told for call, told in calls[name + sinks] if call == operator)
        for operator in ("npu_fusion_attention", "npu_fusion_attention_grad")
    )
    for told in (forward, gradient):
        assert told["input_layout"] == "TND" and told["sparse_mode"] == TOLD[name]["sparse_mode"]
        assert told["actual_seq_qlen"] == queries and told["actual_seq_kvlen"] == keys


CAUSAL = {"sparse_mode": 3}
WINDOW_OF_8 = {"sparse_mode": 4, "pre_tockens": 7, "next_tockens": 0}
TOLD = {
    "full": {**CAUSAL, "head_num": 4},
    "grouped": {**CAUSAL, "head_num": 8},
    "window": {**WINDOW_OF_8, "head_num": 4},
    "window of one": {**WINDOW_OF_8, "pre_tockens": 0},
    "window wider than the sequence": CAUSAL,
    "mla": {**CAUSAL, "head_num": 4},
    "fewer queries": CAUSAL,
    "fewer queries, window": WINDOW_OF_8,
}


@pytest.mark.parametrize("name", scenarios.ATTENTIONS)
def test_what_fusion_attention_is_told(found, name):
    forward, gradient = found["attention"][1][name]
    assert forward[0] == "npu_fusion_attention" and gradient[0] == "npu_fusion_attention_grad"
    told = {"input_layout": "SBH", "keep_prob": 1.0, **TOLD[name]}
    assert told.items() <= forward[1].items()
    assert forward[1]["scale"] == gradient[1]["scale_value"] == 0.1
    for key in ("sparse_mode", "pre_tockens", "next_tockens", "head_num"):
        default = 2147483647  # arguments that have it may be left out
        assert forward[1].get(key, default) == gradient[1].get(key, default)


@pytest.fixture(scope="module")
def runs(stand_in, tmp_path_factory):
    """The same short trainings on a CPU and on the stand-in: metrics and operators' arguments."""
    folder = make_inputs(tmp_path_factory.mktemp("dense"), num_hidden_layers=2)
    flags = {"sliding_window": 8, "sink": "logit", "full_layers": "1"}
    make_student(folder, "sink_logits", "gate_swa", flags)
    experts = make_inputs(tmp_path_factory.mktemp("experts"), "qwen3_moe", num_hidden_layers=2)
    jobs = {
        "stage 1, mla": (1, folder, "mla", {"use_distributed_optimizer": True}),
        "stage 1, gate_swa": (1, folder, "gate_swa", BF16),
        "stage 2, gate_swa": (2, folder, "gate_swa", {"use_distributed_optimizer": True}),
        "stage 2, sink_logits": (2, folder, "sink_logits", {"recompute": "selective"}),
        "stage 2, mla, all": (2, folder, "mla", {"trainable": "all", "recompute": "full"}),
        "stage 2, experts": (2, experts, "mla", {**BF16, "moe_grouped_gemm": True}),
        "stage 2, documents": (2, folder, "sink_logits", DOCUMENTS),
    }
    on_npu, on_cpu = (
        {
            name: (stage, inputs, student, tmp_path_factory.mktemp("run"), fields)
            for name, (stage, inputs, student, fields) in jobs.items()
        }
        for _ in range(2)
    )
    expected = {name: processes.run(1, scenarios.train, *on_cpu[name])[0] for name in jobs}
    expected["fit"] = scenarios.fit(folder, tmp_path_factory.mktemp("edit"))
    fitted = (folder, tmp_path_factory.mktemp("edit"))
    return dry_run.run(stand_in, "train_all", on_npu, fitted), expected


RUNS = (
    "stage 1, mla",
    "stage 1, gate_swa",
    "stage 2, gate_swa",
    "stage 2, sink_logits",
    "stage 2, mla, all",
    "stage 2, experts",
    "stage 2, documents",
)


@pytest.mark.parametrize("name", RUNS)
def test_training(runs, name):
    """Losses and gradient norms of whole runs, through Megatron, optimizer and checkpoint."""
    ours, theirs = (side[name][0] for side in runs)
    assert len(ours) == len(theirs) == 2
    half = name in ("stage 1, gate_swa", "stage 2, experts")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-2 if half else 1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-2 if half else 1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stage 1, mla", {"npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"}),
        ("stage 2, experts", {"npu_grouped_matmul", "npu_swiglu"}),
    ],
)
def test_training_uses_the_kernels(runs, name, expected):
    assert expected <= {call for call, _ in runs[0][name][1]}


def test_a_window_reaches_the_kernel(runs):
    """The edited layer slides, 8 tokens; the teacher's and the other layer do not."""
    calls = [
        told for call, told in runs[0]["stage 2, gate_swa"][1] if call == "npu_fusion_attention"
    ]
    modes = {
        (told["sparse_mode"], told["pre_tockens"]) for told in calls if told["sparse_mode"] == 4
    }
    assert modes == {(4, 7)}
    assert any(told["sparse_mode"] == 3 for told in calls)


def test_documents_reach_the_kernel(runs):
    calls = [t for c, t in runs[0]["stage 2, documents"][1] if c == "npu_fusion_attention"]
    assert {(told["input_layout"], told["sparse_mode"]) for told in calls} == {
        ("TND", 3),
        ("TND", 4),
    }
    # A look at the teacher takes one sample, the training two.
    assert {told["actual_seq_qlen"][-1] for told in calls} == {64, 128}


def test_an_edit_fits_the_same_weights(runs):
    """Calibration on the NPU, decompositions in float64 on the host."""
    ours, theirs = (side["fit"] for side in runs)
    assert ours.keys() == theirs.keys() and len(ours) == 5 * 2
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() / weight.norm() < 1e-4, name
