"""The suite serve without an engine: directories, ratios, tables."""

import json
from pathlib import Path

import pytest

from tools.benchmark import serve, serve_one_model, serve_report


def model(ms, requests, full, prefill=None):
    case = {"decode_ms": ms, **({"prefill_tokens_per_s": prefill} if prefill else {})}
    return {
        "max_model_len": 36864, "requests": requests, "cases": {"8x32768": case}, "vllm": "0.26.0",
        "date": "2026-11-30", "device": "NVIDIA H200",
        "full": {"8192": {"gb": 70.0, "tokens_per_s": full}},
    }  # fmt: skip


MODELS = {
    "qwen3_8b/teacher": model(14.52, 21.5, 2508, 25417),
    "qwen3_8b/mla": model(8.83, 76.0, 5683, 23736),
    "other/mla": model(1.0, 1.0, 1.0),
}


def test_above_one_the_student_is_better():
    found = serve_report.ratios(MODELS)
    assert found == {"qwen3_8b/mla": {
        "8 x 32768 tokens: ms per step": pytest.approx(1.644),
        "prompts of 8 x 32768 tokens: tokens/s": pytest.approx(0.934),
        "requests of 36,864 tokens that fit": pytest.approx(3.535),
        "70 GB full of prompts of 8,192: tokens/s": pytest.approx(2.266),
    }}  # fmt: skip


def test_the_page_is_made_of_the_file(tmp_path):
    file, page = tmp_path / "serve.json", tmp_path / "page.md"
    for name, model in MODELS.items():
        part = tmp_path / f"{name.replace('/', '-')}.json"
        part.write_text(json.dumps({"models": {name: model}}))
    page.write_text(f"before\n{serve_report.BEGIN}\nold\n{serve_report.END}\nafter\n")
    serve_report.report([file, *sorted(tmp_path.glob("*-*.json"), reverse=True)], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "### qwen3_8b: NVIDIA H200, vLLM 0.26.0, 2026-11-30" in text
    assert "| 8 x 32768 tokens: ms per step | 14.52 | 8.83 (1.64 x) |" in text
    assert json.loads(file.read_text())["ratios"] == serve_report.ratios(MODELS)


def test_directories_of_a_teacher_and_its_students(tmp_path):
    serve.prepare(tmp_path, [Path("examples/recipes/qwen3_8b/config.json")], num_layers=12)
    folders = {name: tmp_path / "qwen3_8b" / name for name in ("teacher", "mla", "gate_swa")}
    configs = {n: json.loads((f / "config.json").read_text()) for n, f in folders.items()}
    assert all(c["num_hidden_layers"] == 12 and c["dtype"] == "bfloat16" for c in configs.values())
    assert configs["teacher"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000}
    assert configs["mla"]["kv_lora_rank"] + configs["mla"]["qk_rope_head_dim"] == 576
    assert configs["gate_swa"]["layer_types"].count("full_attention") == 2
    assert (folders["gate_swa"] / "modeling_gate_swa.py").is_file()
    batched = {n: json.loads((f / "engine.json").read_text()) for n, f in folders.items()}
    assert batched["gate_swa"]["max_num_batched_tokens"] == 2048
    assert batched["mla"]["max_num_batched_tokens"] == 8192


def test_longer_prompts_begin_with_the_shorter_ones():
    short, longer = (serve_one_model.prompts(3, n, 1000) for n in (16, 40))
    assert [prompt[:16] for prompt in longer] == short
    assert len({tuple(prompt) for prompt in longer}) == 3
