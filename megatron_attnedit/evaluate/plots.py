"""The report's plots as inline SVG."""

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_attnedit.evaluate.tasks.tables import entries_of

TEACHER_COLOR = "#6b7280"
COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
}


def _svg(draw: Any, *args: Any) -> str:
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        draw(figure.add_subplot(), *args)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _colors(students: dict[str, Any]) -> dict[str, str]:
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(students)}


def loss_curves(students: dict[str, Any], stage: str) -> str | None:
    """Training loss of every student, validation dashed; None where nothing was logged."""
    if not any(stage in entry["metrics"] for entry in students.values()):
        return None
    return _svg(_draw_losses, students, stage)


def _draw_losses(axes: Axes, students: dict[str, Any], stage: str) -> None:
    for name, color in _colors(students).items():
        lines = students[name]["metrics"].get(stage, [])
        for key, style, label in (("loss", "-", name), ("validation_loss", "--", None)):
            known = (line for line in lines if line.get(key) is not None)
            points = [(line["tokens"] / 1e6, line[key]) for line in known]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=label)
    axes.set(xlabel="tokens (millions)", yscale="log")
    axes.set_ylabel("KL (nats per token)" if stage == "stage2" else "relative error")
    axes.legend()


def layer_errors(students: dict[str, Any]) -> str:
    """Relative error of each attention: dashed after the edit, full in the last state."""
    return _svg(_draw_layers, students)


def _draw_layers(axes: Axes, students: dict[str, Any]) -> None:
    for name, color in _colors(students).items():
        entry = students[name]
        last = entry["last_state"].replace("_", " ").replace("stage", "stage ")
        for key, style, when in (
            ("relative_error_after_edit", "--", "after edit"),
            ("relative_error", "-", last),
        ):
            # A kept layer has no error at all, which a logarithmic axis cannot show.
            errors = [(i, e) for i, e in enumerate(entry.get(key, ()), start=1) if e > 0]
            if errors and not (when == last and key.endswith("edit")):
                x, y = zip(*errors, strict=True)
                axes.plot(x, y, style, marker="o", ms=3, color=color, label=f"{name}, {when}")
    axes.set(xlabel="layer", ylabel="relative error of the attention", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    if axes.lines:
        axes.legend(fontsize=8)


def kv_growth(report: dict[str, Any]) -> str:
    """Cache bytes over context length."""
    return _svg(_draw_growth, report)


def _draw_growth(axes: Axes, report: dict[str, Any]) -> None:
    curves = {"teacher": (report["teacher"], TEACHER_COLOR)}
    for name, color in _colors(report["students"]).items():
        curves[name] = (report["students"][name], color)
    for name, (entry, color) in curves.items():
        x, y = zip(*entry["kv_growth"], strict=True)
        axes.plot(x, [size / 1024 for size in y], marker="o", ms=3, color=color, label=name)
    axes.set(xlabel="context (tokens)", ylabel="KV cache (KiB)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()


def scores_over_length(report: dict[str, Any]) -> dict[str, str]:
    """By task, the score of every model over the length of the prompt, with standard errors."""
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, entry in entries_of(report).items():
        for record in entry["tasks"]:
            if record["length"]:
                curves.setdefault(record["task"], {}).setdefault(name, []).append(record)
    colors = {"teacher": TEACHER_COLOR, **_colors(report["students"])}
    return {task: _svg(_draw_scores, models, colors) for task, models in curves.items()}


def _draw_scores(
    axes: Axes, models: dict[str, list[dict[str, Any]]], colors: dict[str, str]
) -> None:
    for name, records in models.items():
        x = [record["length"] for record in records]
        y = [100 * record["score"] for record in records]
        error = [100 * (record["stderr"] or 0.0) for record in records]
        axes.errorbar(x, y, error, marker="o", ms=3, capsize=2, color=colors[name], label=name)
    axes.set(xlabel="prompt and answer (tokens)", ylabel="score (%)", ylim=(-5, 105))
    axes.set_xscale("log", base=2)
    lengths = sorted({record["length"] for records in models.values() for record in records})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.legend()
