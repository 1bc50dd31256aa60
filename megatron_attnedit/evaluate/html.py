"""``report.html``: one file that needs no other, readable on a screen and on paper."""

from collections.abc import Mapping
from html import escape
from typing import Any

from megatron_attnedit.evaluate import plots, table
from megatron_attnedit.evaluate.generation import NEW_TOKENS
from megatron_attnedit.evaluate.recall import KEY_TOKENS, VALUE_TOKENS
from megatron_attnedit.evaluate.tasks import tables

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: #1f2937;
  background: #fff; max-width: 1080px; margin: 2.5rem auto; padding: 0 1.5rem; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .2rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .6rem; }}
p, figcaption, .small {{ color: #4b5563; }}
.small, figcaption {{ font-size: .85rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .6rem; border-bottom: 1px solid #e5e7eb; text-align: right; }}
th {{ font-weight: 600; font-size: .82rem; color: #4b5563; border-bottom-color: #9ca3af; }}
.summary th:first-child, .summary td:first-child {{ text-align: left; font-weight: 600; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr));
  gap: 1.5rem; }}
figure {{ margin: 0; break-inside: avoid; }}
figure svg {{ width: 100%; height: auto; }}
.texts {{ table-layout: fixed; margin-bottom: 1.4rem; break-inside: avoid; }}
.texts th, .texts td {{ text-align: left; vertical-align: top; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
.texts td {{ font-size: .85rem; }}
.prompt {{ background: #f3f4f6; border-left: 3px solid #9ca3af; padding: .5rem .8rem;
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }}
@media print {{ body {{ margin: 0; max-width: none; font-size: 11px; }}
  .wide {{ overflow: visible; }} th, td {{ padding: .25rem .3rem; }}
  .plots {{ grid-template-columns: 1fr 1fr; }} }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def render(report: dict[str, Any]) -> str:
    """The page of a report."""
    parts = [_head(report), _summary(report), _behaviour(report), _tasks(report), _plots(report)]
    parts.append(_continuations(report))
    return PAGE.format(title="Attention editing report", body="\n".join(parts))


def _head(report: dict[str, Any]) -> str:
    data = report["data"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        "<h1>Attention editing report</h1>\n"
        f"<p>Teacher {escape(report['teacher']['name'])}; {escape(data['file'])}: "
        f"{data['windows']:,} windows of {data['seq_length']:,} tokens "
        f"({data['tokens']:,} in all).<br>{escape(report['date'])}, {escape(report['dtype'])} "
        f"on {escape(report['device'])}; {escape(versions)}.</p>"
    )


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(_row("td", cells) for cells in rows)
    return (
        '<div class="wide"><table class="summary">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _behaviour(report: dict[str, Any]) -> str:
    rows = table.behaviour_rows(report)
    if not rows:
        return ""
    count = report["teacher"].get("generation", {}).get("prompts", 0)
    probes = report["teacher"].get("recall", {}).get("probes", 0)
    return (
        f"<h2>Generation and long-range recall</h2>\n{_table(table.BEHAVIOUR_HEADER, rows)}"
        f'<p class="small">Greedy continuations of {count} held-out prompts by {NEW_TOKENS} '
        "tokens: share of positions with the teacher's token, tokens before the first "
        "difference, share of equal continuations, and 4-grams that their continuation had "
        "before. Recall: "
        f"in {probes} texts, {KEY_TOKENS} random tokens and {VALUE_TOKENS} after them, the first "
        "ones again at the end: share of the others predicted, and their negative log-likelihood "
        "in nats. Standard errors are over prompts and texts.</p>"
    )


def _tasks(report: dict[str, Any]) -> str:
    rows = tables.rows(report)
    if not rows:
        return ""
    asked = report["tasks"]
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in asked.items()
        if value not in (None, False, [])
    )
    parts = [
        f"<h2>Tasks</h2>\n{_table(tables.HEADER, rows)}",
        '<p class="small">Percent where a measure goes from 0 to 1, each number with its standard '
        "error. n: items. Student - teacher: mean of the items' differences. Wins, ties, losses: "
        "share of the items in which the student does better than, like, and worse than the "
        f"teacher. Settings: {escape(settings)}.</p>",
    ]
    if letters := tables.letter_rows(report):
        parts.append(
            f"<h2>Letters chosen in multiple choice</h2>\n{_table(tuple(letters[0]), letters[1:])}"
            '<p class="small">Percent of the answers, with its standard error over n questions; '
            "each is asked in four orders, so that every letter is right in 25 %.</p>"
        )
    if figures := plots.scores_over_length(report):
        parts.append(f'<div class="plots">{_figures(figures)}</div>')
    return "\n".join(parts)


def _summary(report: dict[str, Any]) -> str:
    context = report["teacher"]["kv_context"]
    return (
        f"<h2>Summary</h2>\n{_table(table.HEADER, table.rows(report))}"
        '<p class="small">Perplexity on held-out text (the teacher has one state only). Ratio: '
        "student's last perplexity over the teacher's. KL(teacher || student) and agreement of "
        "the likeliest token in the last state. KV: cache bytes per token, counted on a cache "
        f"filled with {context:,} tokens, and their share of the teacher's. Standard errors are "
        f"those of {report['data']['tokens']:,} independent tokens.</p>"
    )


def _row(cell: str, texts: list[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in texts) + "</tr>"


def _plots(report: dict[str, Any]) -> str:
    students = report["students"]
    figures = {
        "Stage 1, layer-wise: training loss (dashed: validation)": plots.loss_curves(
            students, "stage1"
        ),
        "Between the stages, on the student's own hidden states": plots.loss_curves(
            students, "between"
        ),
        "Stage 2, model-level: training loss (dashed: validation)": plots.loss_curves(
            students, "stage2"
        ),
        "Error of each attention on the teacher's input (layers without error are left out)": (
            plots.layer_errors(students)
        ),
        "Key-value cache of one sequence": plots.kv_growth(report),
    }
    return f'<h2>Curves</h2>\n<div class="plots">{_figures(figures)}</div>'


def _figures(figures: Mapping[str, str | None]) -> str:
    return "\n".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, svg in figures.items()
        if svg is not None
    )


def _continuations(report: dict[str, Any]) -> str:
    if not report["continuations"]:
        return ""
    parts = ["<h2>Greedy continuations</h2>"]
    for entry in report["continuations"]:
        names, texts = list(entry["texts"]), list(entry["texts"].values())
        parts.append(
            f'<p class="prompt">{escape(entry["prompt"])}</p>\n<table class="texts">'
            f"<thead>{_row('th', names)}</thead><tbody>{_row('td', texts)}</tbody></table>"
        )
    return "\n".join(parts)
