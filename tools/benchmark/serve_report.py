"""What serve.py measured, as ratios to the teacher and as tables of a page."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from megatron_attnedit.files import write_output
from tools.benchmark.markdown import markdown_table, put_between

BEGIN, END = "<!-- tables of served models -->", "<!-- end of tables -->"


class Figure(NamedTuple):
    """A number of one model."""

    value: float
    form: str
    smaller_is_better: bool = False


def figures(model: dict[str, Any]) -> dict[str, Figure]:
    """What is compared, by the words of its row."""
    rows = {}
    for case, found in model["cases"].items():
        words = case.replace("x", " x ")
        rows[f"{words} tokens: ms per step"] = Figure(found["decode_ms"], ".2f", True)
    for case, found in model["cases"].items():
        if "prefill_tokens_per_s" in found:  # nothing of them was cached
            words = f"prompts of {case.replace('x', ' x ')} tokens: tokens/s"
            rows[words] = Figure(found["prefill_tokens_per_s"], ",.0f")
    words = f"requests of {model['max_model_len']:,} tokens that fit"
    rows[words] = Figure(model["requests"], ".1f")
    for tokens, found in model["full"].items():
        words = f"{found['gb']:g} GB full of prompts of {int(tokens):,}: tokens/s"
        rows[words] = Figure(found["tokens_per_s"], ",.0f")
    return rows


def ratios(models: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of every student to its teacher, by row; above 1 the student is better."""
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        teacher = models.get(f"{name.rpartition('/')[0]}/teacher")
        if teacher is None or teacher is model:
            continue
        theirs = figures(teacher)
        found[name] = {}
        for words, ours in figures(model).items():
            if words in theirs:
                ratio = ours.value / theirs[words].value
                found[name][words] = round(1 / ratio if ours.smaller_is_better else ratio, 3)
    return found


def tables(models: dict[str, Any]) -> str:
    """A table for each teacher with its students, in Markdown; in brackets the ratios."""
    gained, parts = ratios(models), []
    for base in dict.fromkeys(name.rpartition("/")[0] for name in models):
        mine = {name: m for name, m in models.items() if name.rpartition("/")[0] == base}
        rows = {name: figures(model) for name, model in mine.items()}
        header, lines = ["", *(name.rpartition("/")[2] for name in mine)], []
        for words in dict.fromkeys(words for found in rows.values() for words in found):
            cells = [words]
            for name, found in rows.items():
                figure, ratio = found.get(words), gained.get(name, {}).get(words)
                cell = format(figure.value, figure.form) if figure else ""
                cells.append(f"{cell} ({ratio:.2f} x)" if figure and ratio else cell)
            lines.append(cells)
        one = next(iter(mine.values()))
        dates = " and ".join(dict.fromkeys(model["date"] for model in mine.values()))
        title = f"### {base}: {one.get('device', '')}, vLLM {one['vllm']}, {dates}"
        parts.append(f"{title}\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)


def report(files: list[Path], page: Path | None) -> None:
    """Print the ratios, put them into the first file and the tables into the page."""
    models: dict[str, Any] = {}
    for part in files:
        if part.is_file():  # the first one may be new
            models |= json.loads(part.read_text())["models"]
    file, found = files[0], {"models": models}
    found["ratios"] = ratios(found["models"])
    write_output(file, json.dumps(found, indent=1) + "\n")
    for name, mine in found["ratios"].items():
        for words, ratio in mine.items():
            print(f"{name}: {words}: {ratio:.2f} x")
    if page is not None:
        put_between(page, BEGIN, END, f"\n\n{tables(found['models'])}\n\n")
