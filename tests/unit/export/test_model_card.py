"""README.md of an export: front matter, figures of the run and of a report, how to serve."""

import dataclasses
import json

import pytest
import yaml

from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.model_card import licence_file, model_card, name_of
from megatron_attnedit.models.lineage import read_lineage
from tests.support.conversions import make
from tests.support.inputs import make_student
from tests.support.models import tiny_hf_dir

RECIPE = {"seed": 1, "lr": 1e-3, "train_iters": 30, "global_batch_size": 2, "seq_length": 1024}
FIGURES = {
    "last_state": "after_stage2",
    "perplexity": {"after_edit": 30.0, "after_stage2": 19.25},
    "perplexity_ratio": 1.1,
    "kl": 0.25,
    "top1_agreement": 0.75,
    "kv_bytes_per_token": 4896.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher and a student of each kind that only the edit made."""
    folder = tmp_path_factory.mktemp("card")
    tiny_hf_dir(folder / "hf")
    make_student(folder, "mla", "mla", {"kv_lora_rank": 16})
    make_student(folder, "gate_swa", "gate_swa", {"sliding_window": 8})
    return folder


def trained(folder, name, tmp_path):
    """The lineage as both stages would have left it, and their logs."""
    lineage = read_lineage(next((folder / name).glob("iter_*")))
    for stage, hours in (("stage1", 2), ("stage2", 3)):
        save = tmp_path / stage
        save.mkdir()
        lines = [
            {"iteration": 0, "stage": int(stage[-1]), "seconds": 1.0, "validation_loss": 0.5},
            {"iteration": 30, "stage": int(stage[-1]), "seconds": hours * 3600, "loss": 0.125},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (save / "metrics.jsonl").write_text(text + '{"cut off')
        data = {"data/text": {"documents": 1000, "tokens": 70_000}}
        lineage = lineage.then(stage, recipe={**RECIPE, "save": str(save)}, data=data)
    return lineage


def card(folder, lineage, source, **fields):
    hf = read_hf_config(folder / "hf")
    given = {"base_model": "org/teacher", "dtype": "bfloat16", **fields}
    text = model_card(hf, lineage, source=source, **given)
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_a_trained_student(folder, tmp_path):
    lineage = trained(folder, "mla", tmp_path)
    header, body = card(folder, lineage, tmp_path / "stage2" / "iter_0000030")
    assert header["base_model"] == "org/teacher" and "license" not in header
    assert body.startswith("\n# teacher with mla\n")
    assert header["tags"] == ["attention-editing", "mla", "kv-cache"]
    # 3 layers, 2 KV heads of 32 and a latent of 16 with a rotary key of 16; 2 bytes each.
    assert "| teacher | 768 |" in body and "| this model | 192 (25.0%) |" in body
    assert "| stage 1, layer-wise | 61,440 | 1,024 | 0.001 | 0.1250 | 0.5000 | 2.00 |" in body
    assert "| stage 2, model-level | 61,440 | 1,024 | 0.001 | 0.1250 | 0.5000 | 3.00 |" in body
    assert "Data: text (1,000 documents, 70,000 tokens)." in body
    assert "Trained: the new attention only." in body and "## Evaluation" not in body
    assert lineage.teacher_fingerprint in body
    assert "vllm serve" not in body and "not for vllm: no engine has a kernel" in body


def test_a_report_of_several_students(folder, tmp_path):
    lineage = trained(folder, "mla", tmp_path)
    runs = {run["stage"]: run["recipe"] for run in lineage.history[1:]}
    runs["edit"] = {**runs["edit"], "student_attention": lineage.student_attention}
    runs["stage2"] = lineage.recipe
    other = {**runs, "stage2": {**lineage.recipe, "lr": 1.0}}
    report = {
        "teacher": {"perplexity": 17.5},
        "students": {
            "random": {**FIGURES, "runs": other, "kl": 9.0}, "mine": {**FIGURES, "runs": runs}
        },
        "data": {"file": "heldout.jsonl", "tokens": 49152, "seq_length": 1024},
    }  # fmt: skip
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    _, body = card(folder, lineage, tmp_path / "stage2", report=file)
    assert "|  | mine |" in body and "| perplexity | 19.250 |" in body
    assert "| KL(teacher, student), nats | 0.2500 |" in body
    assert "| same likeliest token | 75.0% |" in body
    assert "On 49,152 tokens of heldout.jsonl" in body
    del report["students"]["mine"]
    file.write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"^--report .*none of its students \(random\) was train"):
        card(folder, lineage, tmp_path / "stage2", report=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "not a report"), ('{"students": []}', "not a report")],
)
def test_what_is_no_report(folder, tmp_path, text, message):
    file = tmp_path / "report.json"
    file.write_text(text)
    lineage = read_lineage(next((folder / "mla").glob("iter_*")))
    with pytest.raises(UserError, match=f"--report {file}: {message}"):
        card(folder, lineage, folder / "mla", report=file)


def test_gate_swa_says_what_its_window_needs(folder):
    lineage = read_lineage(next((folder / "gate_swa").glob("iter_*")))
    _, body = card(folder, lineage, folder / "gate_swa")
    assert "vllm serve PATH --max-num-batched-tokens 2048" in body
    assert "vllm-ascend (read, not run)" in body
    assert "None: the new attention is as the edit left it." in body


def test_an_export_has_its_card(folder, tmp_path):
    hf = make(folder / "mla", tmp_path / "student", "hf")
    _, header, _ = (hf / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == "hf"
    assert not (make(folder / "hf", tmp_path / "teacher", "hf") / "README.md").exists()
    report = tmp_path / "report.json"
    report.write_text('{"students": {}}')
    with pytest.raises(UserError, match="none of its students"):
        make(folder / "mla", tmp_path / "refused", "hf", report=report)
    assert not (tmp_path / "refused").exists()
    with pytest.raises(UserError, match="--report .* holds a teacher"):
        make(folder / "hf", tmp_path / "refused", "hf", report=report)
    with pytest.raises(UserError, match="--report .*only hf directories have a card"):
        make(folder / "mla", tmp_path / "refused", "torch_dist", report=report)


def test_the_licence_is_the_teachers(folder, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    hf = dataclasses.replace(read_hf_config(folder / "hf"), path=teacher)
    lineage = read_lineage(next((folder / "mla").glob("iter_*")))

    def licence():
        text = model_card(hf, lineage, base_model="t", dtype="float32", source=teacher)
        return {k: v for k, v in yaml.safe_load(text.split("---\n")[1]).items() if "licen" in k}

    assert licence() == {} and licence_file(teacher) is None
    (teacher / "LICENSE").write_text("terms")
    assert licence()["license_link"] == "LICENSE" and licence_file(teacher).read_text() == "terms"
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Teacher\n")
    assert licence() == {"license": "apache-2.0"} and licence_file(teacher) is None
    (teacher / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence()["license"] == "other"


def test_the_name_of_a_teacher(tmp_path):
    cached = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0123"
    assert name_of(cached, {}) == "Qwen/Qwen3-8B"
    assert name_of(tmp_path / "Qwen3-8B", {}) == "Qwen3-8B"
    assert name_of(tmp_path, {"_name_or_path": "Qwen/Qwen3-8B"}) == "Qwen/Qwen3-8B"
    assert name_of(tmp_path / "a", {"_name_or_path": "/data/Qwen3-8B"}) == "a"
