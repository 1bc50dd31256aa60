"""A run that becomes longer: it continues from before its decay, by its new recipe."""

import json

import pytest

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.training.recipe import Stage2Recipe
from tests.integration.test_faults import recipe, train_here
from tests.support.inputs import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)


def logged(folder, key):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line[key] for line in lines if key in line}


def test_a_longer_schedule_goes_on_from_before_the_decay(inputs, tmp_path):
    fields = {
        "lr": 1e-3, "min_lr": 0.0, "lr_warmup_iters": 0, "lr_decay_style": "WSD",
        "lr_wsd_decay_style": "linear", "lr_wsd_decay_iters": 2, "save_interval": 2,
        "data_cache_path": str(tmp_path / "cache"),
    }  # fmt: skip

    def stage2(name, train_iters, **changes):
        save = tmp_path / name
        one = recipe(inputs, save, Stage2Recipe, train_iters=train_iters, **(fields | changes))
        train_here(tmp_path, one)
        return save

    # An iteration's learning rate is that of the ones before it: the first decayed one is the 4th.
    short = stage2("short", 4)
    assert logged(short, "lr") == pytest.approx({1: 1e-3, 2: 1e-3, 3: 1e-3, 4: 5e-4})
    run_folder.track(short, 2)
    longer = stage2("short", 6)
    whole = stage2("whole", 6)
    rates = {1: 1e-3, 2: 1e-3, 3: 1e-3, 4: 1e-3, 5: 1e-3, 6: 5e-4}
    assert logged(longer, "lr") == pytest.approx(rates) == logged(whole, "lr")
    assert logged(longer, "loss") == logged(whole, "loss")
    run_folder.track(longer, 6)
    other = stage2("short", 8, lr=2e-3, lr_wsd_decay_iters=1)
    assert logged(other, "lr")[7] == pytest.approx(2e-3)
