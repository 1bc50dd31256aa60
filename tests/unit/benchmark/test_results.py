"""Figures that are kept, and pages made of them."""

import copy
import json
import math
import sys

import pytest

from megatron_attnedit.errors import UserError
from tools.benchmark import results
from tools.benchmark.published import add_report, tokens_to_reach, validations
from tools.benchmark.tables import filled


def stage(number, losses, *, validate_every=10):
    """Metrics of a run of 10,000 tokens and half a second an iteration."""
    lines = []
    for i, loss in enumerate(losses, start=1):
        line = {"iteration": i, "stage": number, "seconds": i / 2, "tokens": 10_000 * i}
        lines.append({**line, "loss": loss, "layer_losses": {"1": loss}})
        if i % validate_every == 0:
            lines.append({**line, "validation_loss": loss})
    return lines


def student(final, **changes):
    losses = [final + (100 - i) / 100 for i in range(1, 101)]
    recipe = {"lr": 2e-3, "seed": 3, "train_iters": 100, "save": "/a/place", "kl": "forward"}
    return {
        "perplexity": {"after_edit": 1234.56, "after_stage1": 9.876, "after_stage2": 5.4321},
        "perplexity_ratio": 1.0864,
        "kl": 0.1234,
        "top1_agreement": 0.9012,
        "kv_bytes_per_token": 2048,
        "kv_fraction": 0.125,
        "metrics": {"stage1": stage(1, losses), "stage2": stage(2, losses)},
        "runs": {"edit": {"seed": 3, "init": "teacher"}, "stage1": recipe, "stage2": recipe},
        **changes,
    }


@pytest.fixture
def report():
    generation = {
        "prompts": 2, "equal_tokens": 0.5, "first_divergence": 12.3, "identical": 0.25,
        "repetition_rate": 0.071,
    }  # fmt: skip
    teacher = {"name": "t", "perplexity": 5.0, "kv_bytes_per_token": 16384}
    return {
        "data": {"file": "a.jsonl", "tokens": 100},
        "dtype": "bfloat16",
        "teacher": {**teacher, "generation": generation},
        "students": {"a": student(0.2), "a_random": student(0.7)},
        "continuations": [{"prompt": "x", "texts": {}}],
    }


def test_added_students_are_thin_and_complete(report, tmp_path):
    file = tmp_path / "data" / "kept.json"
    before = copy.deepcopy(report)
    add_report(report, file, {"a": "b"})
    assert report == before
    kept = json.loads(file.read_text())
    assert list(kept["students"]) == ["b", "a_random"] and kept["continuations"] == []
    entry = kept["students"]["b"]
    lines = entry["metrics"]["stage2"]
    assert [line["tokens"] for line in lines if "validation_loss" in line] == list(
        range(100_000, 1_000_001, 100_000)
    )
    trained = [line["iteration"] for line in lines if "loss" in line]
    assert len(trained) == 50 and trained[-1] == 100 and trained == sorted(trained)
    assert not any("layer_losses" in line for line in lines)
    assert entry["runs"]["stage1"] == {"lr": 2e-3, "seed": 3, "train_iters": 100, "kl": "forward"}
    add_report({**report, "students": {"b": student(0.2, kl=9.0)}}, file)
    kept = json.loads(file.read_text())["students"]
    assert list(kept) == ["b", "a_random"] and kept["b"]["kl"] == 9


def test_curves_of_runs_with_feature_matching_are_of_the_kl(report, tmp_path):
    lines = report["students"]["a"]["metrics"]["stage2"]
    for line in lines:
        if "validation_loss" in line:
            line["validation_logits_distillation_loss"] = line["validation_loss"] - 0.05
            line["validation_feature_matching_loss"] = 0.05
    add_report(report, tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())["students"]
    assert validations(kept["a"])[-1] == (1_000_000, pytest.approx(0.15))
    assert validations(kept["a_random"])[-1] == (1_000_000, pytest.approx(0.7))


def test_figures_of_other_text_are_refused(report, tmp_path):
    file = tmp_path / "kept.json"
    add_report(report, file)
    with pytest.raises(UserError, match="kept.json: its figures are of data"):
        add_report({**report, "data": {"file": "b.jsonl", "tokens": 100}}, file)
    with pytest.raises(UserError, match="its teacher is t"):
        add_report({**report, "teacher": {"name": "u"}}, file)


def test_tokens_to_reach_a_loss():
    entry = student(0.2)  # stage 1 took 1 M tokens; validation 1.1 at 0.1 M, 1.0 at 0.2 M
    assert tokens_to_reach(entry, 1.0) == pytest.approx(1.20e6)
    assert tokens_to_reach(entry, 1.05) == pytest.approx(1.15e6)
    assert tokens_to_reach(entry, 5.0) == pytest.approx(1.10e6)
    assert tokens_to_reach(entry, 0.1) is None
    del entry["metrics"]["stage1"]
    assert tokens_to_reach(entry, 1.0) == pytest.approx(0.2e6)


PAGE = """# Page
{}
text stays
"""


def page(*kinds):
    marks = (f"<!-- table: {kind} kept.json -->\nold\n<!-- end of table -->" for kind in kinds)
    return PAGE.format("\n".join(marks))


def test_page_is_filled(report, tmp_path):
    add_report(report, tmp_path / "kept.json")
    text = filled(page("summary", "cost", "generation"), tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["teacher", "", "", "5.00", "1", "", "", "16,384"] in rows
    quality = ["1,234.6", "9.88", "5.43", "1.086", "0.123", "90.1 %", "2,048 (12.5 %)"]
    assert ["a", *quality] in rows
    assert ["a", "2e-3 + 2e-3", "3", "1.00 + 1.00", "0.8 + 0.8"] in rows
    assert ["teacher", "50.0 %", "12.3", "25.0 %", "7.1 %", "-", "-"] in rows
    assert "old" not in text and text.startswith("# Page\n") and text.endswith("text stays\n")
    assert filled(text, tmp_path) == text
    assert filled("A page without marks.\n", tmp_path) == "A page without marks.\n"


def arm(final, *, name="mla", init="teacher", stages=(1, 2), lr=1e-3, **changes):
    """A student that ends at a validation KL of ``final``."""
    entry = student(final, kl=final / 2, **changes)
    dims = {"name": name, "full_layers": [0]}
    if name == "mla":
        dims = {"name": name, "fit": "attention", "kv_lora_rank": 8, "qk_pos_emb_head_dim": 4}
    entry["runs"]["edit"] = {"init": init, "seed": 3, "student_attention": dims}
    entry["runs"]["stage2"] = {"lr": lr, "seed": 3}
    for stage in {1, 2} - {*stages}:
        del entry["runs"][f"stage{stage}"], entry["metrics"][f"stage{stage}"]
    return entry


def cells(*args):
    rows = [line.split("|")[1:-1] for line in filled(page(args[0]), args[1]).splitlines()]
    return [[cell.strip() for cell in row] for row in rows if row][2:]


def test_arms_at_their_best_learning_rates(report, tmp_path):
    measured = arm(0.4, name="gate_swa", recall={"accuracy": 0.5, "nll": 1.0})
    measured["runs"]["edit"]["full_layer_scores"] = [0.1]
    everything = arm(0.1)
    everything["runs"]["stage2"]["trainable"] = "all"
    larger = arm(0.15, kv_fraction=0.25)
    larger["runs"]["edit"]["student_attention"]["kv_lora_rank"] = 20
    report["students"] = {
        "worse": arm(0.3), "better": arm(0.2, lr=5e-4), "random": arm(0.7, init="random"),
        "measured": measured, "uniform": arm(0.5, name="gate_swa"), "everything": everything,
        "larger": larger, "unknown": student(0.0),
    }  # fmt: skip
    add_report(report, tmp_path / "kept.json")
    rows = cells("arms", tmp_path)
    assert len(rows) == 6
    mla = ["mla", "teacher", "1 + 2", "8 + 4", "12.5 %", "attention"]
    rates = ["5e-4, 1e-3", "2e-3 + 5e-4", "3"]
    assert rows[0] == [*mla, *rates, "2.0", "1.7", "0.200", "1.086", "0.100", "90.1 %", ""]
    assert rows[1][:4] == ["mla", "random", "1 + 2", "8 + 4"]
    assert rows[1][5:8] == ["attention", "1e-3", "2e-3 + 1e-3"]
    swa = [row[2:4] + row[5:6] + row[-1:] for row in rows if row[0] == "gate_swa"]
    assert swa == [
        ["1 + 2", "measured", "attention", "50.0 %"], ["1 + 2", "uniform", "attention", ""]
    ]  # fmt: skip
    assert rows[-2][5] == "all" and rows[-2][11] == "0.100"
    assert rows[-1][3:6] == ["20 + 4", "25.0 %", "attention"] and rows[-1][11] == "0.150"


def test_an_arm_that_ran_away(report, tmp_path):
    lost = arm(0.4, lr=5e-4)
    lost["perplexity"] = dict.fromkeys(lost["perplexity"], math.inf)
    lost["perplexity_ratio"] = lost["kl"] = lost["kl_after_edit"] = math.inf
    lost["top1_agreement_after_edit"] = 0.1
    for line in lost["metrics"]["stage2"]:
        for name in line.keys() & {"loss", "validation_loss"}:
            line[name] = math.nan
    report["students"] = {"lost": lost, "random": arm(0.7, init="random")}
    add_report(report, tmp_path / "kept.json")
    assert cells("arms", tmp_path)[0][11:14] == ["inf", "", ""]
    assert cells("tokens", tmp_path)[0][5] == "never"
    assert cells("fits", tmp_path)[0][:5] == ["attention", "", "", "", ""]
    lost["runs"]["edit"]["init"] = "random"
    add_report({**report, "students": {"random": lost}}, tmp_path / "kept.json")
    assert cells("tokens", tmp_path) == []
    assert cells("summary", tmp_path)[1][4] == ""


def test_an_arm_with_a_phase_between_the_stages(report, tmp_path):
    own = arm(0.3)
    own["metrics"]["between"] = stage(1, [0.5] * 50)
    own["runs"]["between"] = {"lr": 4e-3, "seed": 3, "scheduled_sampling_end": 1.0}
    assert tokens_to_reach(own, 5.0) == pytest.approx(1.6e6)
    report["students"] = {"own": own, "plain": arm(0.4)}
    add_report(report, tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())["students"]["own"]
    assert kept["runs"]["between"]["scheduled_sampling_end"] == 1
    rows = cells("arms", tmp_path)
    assert [row[2] for row in rows] == ["1 + own + 2", "1 + 2"]
    assert rows[0][7] == "2e-3 + 4e-3 + 1e-3" and rows[0][9] == "2.5"
    assert cells("cost", tmp_path)[0][3] == "1.00 + 0.50 + 1.00"


def test_tokens_to_where_the_random_start_ends(report, tmp_path):
    report["students"] = {
        "random": arm(0.7, init="random"), "random, bad rate": arm(1.5, init="random"),
        "both": arm(0.2), "alone": arm(0.2, stages=(2,)), "never": arm(0.8, stages=(2,)),
        "swa": arm(5.0, name="gate_swa"), "swa_random": arm(4.0, name="gate_swa", init="random"),
    }  # fmt: skip
    add_report(report, tmp_path / "kept.json")
    # The random start ends at 0.7, which the others pass halfway through their second stage.
    assert cells("tokens", tmp_path) == [
        ["mla", "stages 1 + 2", "0.700", "2.00", "stages 1 + 2", "1.50", "75.0 %"],
        ["mla", "stages 1 + 2", "0.700", "2.00", "stage 2", "0.50", "25.0 %"],
        ["gate_swa", "stages 1 + 2", "4.000", "2.00", "stages 1 + 2", "never", ""],
    ]


def test_curve_of_stage_2(report, tmp_path):
    report["students"] = {"a": arm(0.2), "edited": arm(0.2, stages=())}
    add_report(report, tmp_path / "kept.json")
    points = ["1.100 (0.1)", "1.000 (0.2)", "0.900 (0.3)", "0.700 (0.5)", "0.400 (0.8)"]
    assert cells("curve", tmp_path) == [["a", *points, "0.200 (1.0)"]]


def test_first_weights_without_training(report, tmp_path):
    def edit(perplexity, fit, init="teacher"):
        entry = arm(0.2, init=init, stages=(), perplexity={"after_edit": perplexity})
        entry["runs"]["edit"]["student_attention"]["fit"] = fit
        return {**entry, "kl_after_edit": 2.5, "top1_agreement_after_edit": 0.25}

    report["students"] = {
        "a": edit(1005.0, "svd"), "b": edit(105.0, "attention"),
        "c": edit(9e4, "attention", "random"),
    }  # fmt: skip
    add_report(report, tmp_path / "kept.json")
    assert cells("fits", tmp_path) == [
        ["svd", "1,005.0", "1,000.0", "1.000", "2.500", "25.0 %"],
        ["attention", "105.0", "100.0", "0.100", "2.500", "25.0 %"],
        ["random", "90,000.0", "89,995.0", "89.995", "2.500", "25.0 %"],
    ]


def test_bad_marks(tmp_path):
    with pytest.raises(UserError, match="kept.json is missing"):
        filled(page("summary"), tmp_path)
    (tmp_path / "kept.json").write_text("{}")
    with pytest.raises(UserError, match="table: graph kept.json.*expected one of summary"):
        filled(page("graph"), tmp_path)


def test_the_tool(report, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "page.md").write_text(page("summary"))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["results.py", *map(str, flags)])
        results.main()

    kept = tmp_path / "kept.json"
    run("add", tmp_path / "report.json", "--data", kept, "--rename", "a=mla")
    run("fill", tmp_path / "page.md", "--data", tmp_path)
    assert "| mla | 1,234.6 |" in (tmp_path / "page.md").read_text()
    with pytest.raises(UserError, match="--rename a: expected OLD=NEW"):
        run("add", tmp_path / "report.json", "--data", kept, "--rename", "a")
    with pytest.raises(UserError, match="none.md: No such file"):
        run("fill", tmp_path / "none.md")
