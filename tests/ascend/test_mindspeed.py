"""Dry run with MindSpeed's adaptor over the torch_npu wheel; opt-in.

    MEGATRON_ATTNEDIT_MINDSPEED=/path/to/MindSpeed python -m pytest tests/ascend/test_mindspeed.py

The checkout is of the branch for the installed megatron-core, core_r0.16.0 for the tested one, and
what it requires is installed. triton-ascend, if it is
not, is stood in for.
"""

import pytest

from tests.ascend import dry_run, scenarios
from tests.support import processes
from tests.support.inputs import make_inputs

RUNS = {"stage 1": (1, "mla"), "stage 2": (2, "gate_swa")}
OURS = "megatron_attnedit."


@pytest.fixture(scope="module")
def environment():
    try:
        return dry_run.with_mindspeed()
    except dry_run.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def both(environment, tmp_path_factory):
    """On the stand-in with the adaptor, and on a CPU without."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)

    def jobs():
        fields = {"use_distributed_optimizer": True}
        return {
            name: (stage, folder, student, tmp_path_factory.mktemp("run"), fields)
            for name, (stage, student) in RUNS.items()
        }

    expected = {name: processes.run(1, scenarios.train, *job)[0] for name, job in jobs().items()}
    expected["config"] = processes.run(1, scenarios.config_of, folder)[0]
    return dry_run.run(environment, "under_mindspeed", jobs()), expected


def test_the_adaptor_is_applied(both):
    assert both[0]["adaptor"] == "mindspeed.megatron_adaptor" and both[0]["repatches"]


def test_layers_are_made_of_our_classes(both):
    assert both[0]["classes"] == {
        "input_layernorm": f"{OURS}attention.norm.RMSNorm",
        "self_attention": f"{OURS}attention.self_attention.CausalSelfAttention",
        "core_attention": f"{OURS}core_attention.module.CoreAttention",
        "student": f"{OURS}attention.mla.module.MLASelfAttention",
        "student core_attention": f"{OURS}core_attention.module.CoreAttention",
        "final_layernorm": f"{OURS}attention.norm.RMSNorm",
    }
    assert both[0]["backends"] == {"npu_fusion_attention"}


def test_no_setting_of_the_model_is_another(both):
    """But for one, which this program sets otherwise on an NPU itself."""
    ours, theirs = both[0]["config"], both[1]["config"]
    assert len(theirs) > 150 and theirs.keys() <= ours.keys()
    differing = {name: ours[name] for name, value in theirs.items() if ours[name] != value}
    assert differing == {"batch_p2p_sync": "True"}


@pytest.mark.parametrize("name", RUNS)
def test_training(both, name):
    ours, theirs = both[0]["runs"][name][0], both[1][name][0]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_windows_are_not_dropped(both):
    """MindSpeed's own attention would forget them."""
    calls = both[0]["runs"]["stage 2"][1]
    told = [arguments for call, arguments in calls if call == "npu_fusion_attention"]
    bands = {(t["sparse_mode"], t["pre_tockens"]) for t in told if t["sparse_mode"] == 4}
    assert bands == {(4, 7)}
