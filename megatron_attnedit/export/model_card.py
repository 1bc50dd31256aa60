"""README.md of an exported student: what it is, cost and can, and how to serve it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import read_input
from megatron_attnedit.models.lineage import Lineage

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
STAGES = {"stage1": "stage 1, layer-wise", "stage2": "stage 2, model-level"}
LONGEST_CONTEXT = 32768
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def model_card(
    hf: HFConfig,
    lineage: Lineage,
    *,
    base_model: str,
    dtype: str,
    source: Path,
    report: Path | None = None,
) -> str:
    """The card, Markdown behind YAML.

    Args:
        hf: The teacher's configuration.
        lineage: The student's.
        base_model: The teacher's name, see ``name_of``.
        dtype: Of the exported tensors.
        source: The run's folder that was exported; may hold ``metrics.jsonl``.
        report: ``report.json`` of an evaluation that had this student in it.

    Raises:
        UserError: the report is none, or has no such student.
    """
    attention = lineage.attention()
    header = {
        **_licence(hf.path),
        "base_model": base_model,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["attention-editing", attention.name, "kv-cache"],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {base_model.rpartition('/')[2]} with {attention.name}",
        f"`{base_model}`, its attention replaced by `{attention.name}` "
        "([Attention Editing](https://arxiv.org/abs/2604.05688), made with megatron_attnedit): "
        f"{_sizes(attention)}.",
        *_cache(hf, attention, dtype),
        *_training(lineage, source),
        *(_evaluation(report, lineage) if report else ()),
        *_serving(hf, attention),
        *_origin(lineage),
    ]
    return "\n\n".join(parts) + "\n"


def name_of(teacher: Path, raw: dict[str, Any]) -> str:
    """The Hub's name of a model where it is known, else the name of its folder.

    Args:
        teacher: Its directory, which may be a snapshot in the Hub's cache.
        raw: Its ``config.json``.
    """
    named = str(raw.get("_name_or_path", ""))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", named) and not Path(named).exists():
        return named
    for part in reversed(teacher.absolute().parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return teacher.resolve().name


def _licence(teacher: Path) -> dict[str, str]:
    """Of the teacher: its card's word, else its licence's file."""
    card = teacher / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if text.startswith("---\n"):
        try:
            header = yaml.safe_load(text[4:].partition("\n---")[0])
        except yaml.YAMLError:
            header = None
        keys = ("license", "license_name", "license_link")
        if isinstance(header, dict) and header.get("license"):
            return {key: str(header[key]) for key in keys if header.get(key)}
    for name in LICENCES:
        if (teacher / name).is_file():
            return {"license": "other", "license_name": "teacher", "license_link": name}
    return {}


def licence_file(teacher: Path) -> Path | None:
    """The file that the card links to; to be copied beside it."""
    name = _licence(teacher).get("license_link", "")
    file = teacher / Path(name).name
    return file if name and file.is_file() else None


def _sizes(attention: StudentAttention) -> str:
    fields = {key: value for key, value in attention.to_dict().items() if key != "name"}
    return ", ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, tuple | list) else value}"
        for key, value in fields.items()
        if value is not None
    )


def _cache(hf: HFConfig, attention: StudentAttention, dtype: str) -> Iterator[str]:
    context = min(LONGEST_CONTEXT, hf.max_position_embeddings)
    teacher = 2 * hf.num_key_value_heads * hf.head_dim * hf.num_hidden_layers * BYTES[dtype]
    student = attention.kv_values_per_token(hf, context) * BYTES[dtype]
    yield "## KV cache"
    yield _table(
        ("", "bytes per token"),
        [("teacher", f"{teacher:,}"), ("this model", f"{student:,.0f} ({student / teacher:.1%})")],
    )
    yield f"{dtype}, at a context of {context:,} tokens."


def _training(lineage: Lineage, source: Path) -> Iterator[str]:
    runs = [run for run in _runs(lineage) if run["stage"] in STAGES]
    if not runs:
        yield "## Training"
        yield "None: the new attention is as the edit left it."
        return
    rows = []
    for run in runs:
        recipe = run["recipe"]
        last = run is runs[-1]
        lines = _metrics(source if last else Path(recipe.get("save") or ""), run["stage"])
        tokens = recipe["train_iters"] * recipe["global_batch_size"] * recipe["seq_length"]
        rows.append((
            STAGES[run["stage"]], f"{tokens:,}", f"{recipe['seq_length']:,}", f"{recipe['lr']:g}",
            _last(lines, "loss"), _last(lines, "validation_loss"),
            f"{lines[-1]['seconds'] / 3600:.2f}" if lines else "",
        ))  # fmt: skip
    yield "## Training"
    yield _table(
        ("", "tokens", "tokens of a sample", "learning rate", "loss", "validation", "hours"), rows
    )
    data = {
        Path(prefix).name: description
        for run in runs
        for prefix, description in (run.get("data") or {}).items()
    }
    if data:
        named = (
            f"{name} ({found.get('documents', 0):,} documents, {found.get('tokens', 0):,} tokens)"
            for name, found in data.items()
        )
        yield f"Data: {'; '.join(named)}."
    trained = "everything" if lineage.trainable == "all" else "the new attention only"
    yield f"Trained: {trained}."


def _runs(lineage: Lineage) -> list[dict[str, Any]]:
    last = {"stage": lineage.stage, "recipe": lineage.recipe, "data": lineage.data}
    return [*lineage.history, last]


def _metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Logged lines of a run, where its folder is still there."""
    run = folder.parent if folder.name.startswith("iter_") else folder
    file = run / "metrics.jsonl"
    if folder == Path() or not file.is_file():
        return []
    found = []
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off while it was written
        if isinstance(entry, dict) and f"stage{entry.get('stage')}" == stage and "seconds" in entry:
            found.append(entry)
    return found


def _last(lines: list[dict[str, Any]], key: str) -> str:
    values = [line[key] for line in lines if key in line]
    return f"{values[-1]:.4f}" if values else ""


def _evaluation(file: Path, lineage: Lineage) -> Iterator[str]:
    report = _read_report(file)
    name, found = _student(report, lineage, file)
    shown = [
        ("perplexity", f"{found['perplexity'][found['last_state']]:.3f}"),
        ("of the teacher", f"{report['teacher']['perplexity']:.3f}"),
        ("ratio", f"{found['perplexity_ratio']:.4f}"),
    ]
    if "kl" in found:
        shown.append(("KL(teacher, student), nats", f"{found['kl']:.4f}"))
        shown.append(("same likeliest token", f"{found['top1_agreement']:.1%}"))
    shown.append(("KV bytes per token, measured", f"{found['kv_bytes_per_token']:,.0f}"))
    data = report.get("data", {})
    yield "## Evaluation"
    yield _table(("", name), shown)
    if data:
        yield f"On {data['tokens']:,} tokens of {data['file']}, {data['seq_length']:,} at a time."


def _read_report(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(read_input(file))
    except ValueError as error:
        raise UserError(f"--report {file}: not valid JSON: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("students"), dict):
        raise UserError(f"--report {file}: not a report of tools/evaluate.py")
    return report


def _student(report: dict[str, Any], lineage: Lineage, file: Path) -> tuple[str, dict[str, Any]]:
    """The student of the report that was trained by the same recipes."""
    mine = {run["stage"]: run["recipe"] for run in _runs(lineage) if run["stage"] != "teacher"}
    mine = json.loads(json.dumps(mine))
    same = []
    for name, entry in report["students"].items():
        runs = {stage: dict(recipe) for stage, recipe in entry.get("runs", {}).items()}
        for recipe in runs.values():
            recipe.pop("student_attention", None)
        # ``between``: another stage 1 after the first.
        if {("stage1" if stage == "between" else stage): r for stage, r in runs.items()} == mine:
            same.append((name, entry))
    if len(same) != 1:
        names = ", ".join(report["students"])
        raise UserError(
            f"--report {file}: {'more than one' if same else 'none'} of its students ({names}) "
            "was trained as this one was"
        )
    return same[0]


def _serving(hf: HFConfig, attention: StudentAttention) -> Iterator[str]:
    engines = attention.engines(hf)
    yield "## How to use"
    yield "\n".join(f"- {engine}" for engine in engines)
    yield (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)\n```'
    )
    flags = ""
    if any(layers.window for layers in attention.cached_layers(hf)):
        flags = " --max-num-batched-tokens 2048"
    if attention.serving_warning(hf) is None:
        yield f"```\nvllm serve PATH{flags}\n```"
    if flags:
        yield (
            "vllm-ascend (read, not run): 0.18 applies the window in pure decoding only, so that "
            "a prompt is read with full attention; 0.20 to 0.25 apply it everywhere, but one token "
            "wider than it was trained."
        )


def _origin(lineage: Lineage) -> Iterator[str]:
    yield "## Origin"
    stages = [run["stage"] for run in _runs(lineage)]
    yield (
        f"Teacher's weights: `{lineage.teacher_fingerprint}`. Steps: {', '.join(stages)}. All "
        "settings are in `attnedit.json`."
    )


def _table(heads: tuple[str, ...], rows: list[Any]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
