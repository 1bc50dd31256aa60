"""Comparison arms: runs that differ in one thing, each at its best learning rate."""

from dataclasses import dataclass
from typing import Any

from megatron_attnedit.evaluate.students import RUNS
from tools.benchmark.published import tokens_to_reach, validations

Entry = dict[str, Any]
ARMS = ["student", "start", "stages", "shape", "cache", "trains", "learning rates", "best", "seed"]
ARMS += ["tokens (M)", "minutes", "validation KL", "ratio", "KL (nats)", "top-1", "recall"]
TOKENS = ["", "random start", "its KL", "its tokens (M)", "start from the teacher"]
TOKENS += ["tokens to reach it (M)", "share"]
# Parts of stage 2 at which a curve is shown.
PARTS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
SHORT = {"stage1": "1", "between": "own", "stage2": "2"}
FITS = ["start", "perplexity", "excess over the teacher", "of weight SVD's", "KL (nats)", "top-1"]


@dataclass(frozen=True)
class Arm:
    """What the runs of an arm have in common; all but seed and learning rate.

    Attributes:
        attention: The student's.
        init: ``teacher`` or ``random``.
        stages: ``1 + 2``, ``1 + own + 2`` (own: on the student's own hidden states), ``1`` or
            ``2``; empty without training.
        shape: MLA: latent + rotary elements per token and layer; GateSWA: how its full layers were
            chosen, ``uniform`` or ``measured``, and sink tokens.
        trainable: In stage 2, ``attention`` or ``all``.
    """

    attention: str
    init: str
    stages: str
    shape: str
    trainable: str


def arm_of(student: Entry) -> Arm | None:
    """The arm of a student of a report; None where its lineage was not kept."""
    runs = student.get("runs", {})
    edit = runs.get("edit", {})
    if not {"init", "student_attention"} <= edit.keys():
        return None
    return Arm(
        attention=edit["student_attention"]["name"],
        init=edit["init"],
        stages=" + ".join(SHORT[name] for name in RUNS if name in runs),
        shape=_shape(edit),
        trainable=runs.get("stage2", {}).get("trainable", "attention"),
    )


def _shape(edit: Entry) -> str:
    attention = edit["student_attention"]
    if attention["name"] == "mla":
        kind = f", {attention['rotary']}" if "rotary" in attention else ""
        return f"{attention['kv_lora_rank']} + {attention['qk_pos_emb_head_dim']}{kind}"
    chosen = "measured" if edit.get("full_layer_scores") else "uniform"
    if attention.get("sink") == "logit":
        chosen += ", sink logits"
    if sinks := attention.get("sink_tokens"):
        chosen += f", {sinks} sink tokens"
    return chosen if attention.get("output_gate") != "none" else f"{chosen}, no gate"


def number(value: float | None, form: str) -> str:
    """Nothing for a number that JSON lacks: infinite, or not a number."""
    return "" if value is None else format(value, form)


def validation_kl(student: Entry) -> float:
    """Stage 2's last, in nats."""
    return validations(student)[-1][1]


def by_arm(students: dict[str, Entry]) -> dict[Arm, list[Entry]]:
    """Students that stage 2 validated, by arm; the one with the smallest validation KL first."""
    found: dict[Arm, list[Entry]] = {}
    for student in students.values():
        arm = arm_of(student)
        if arm is not None and validations(student):
            found.setdefault(arm, []).append(student)
    return {arm: sorted(entries, key=validation_kl) for arm, entries in found.items()}


def arms(report: Entry) -> tuple[list[str], list[list[str]]]:
    """Every arm at its best learning rate; the choice is by validation, not by held-out text."""
    rows = []
    for arm, tried in by_arm(report["students"]).items():
        best = tried[0]
        logged = [name for name in RUNS if name in best["metrics"]]
        stages = [best["metrics"][name][-1] for name in logged]
        runs = best["runs"]
        rates = sorted({run["runs"]["stage2"]["lr"] for run in tried})
        recall = best.get("recall")
        rows.append([
            arm.attention, arm.init, arm.stages, arm.shape,
            f"{100 * best['kv_fraction']:.1f} %", arm.trainable, ", ".join(map(rate, rates)),
            " + ".join(rate(runs[name]["lr"]) for name in logged if name in runs),
            ", ".join(map(str, sorted({run["runs"]["stage2"]["seed"] for run in tried}))),
            f"{sum(end['tokens'] for end in stages) / 1e6:.1f}",
            f"{sum(end['seconds'] for end in stages) / 60:.1f}",
            f"{validation_kl(best):.3f}",
            number(best["perplexity_ratio"], ".3f"),
            number(best["kl"], ".3f"),
            f"{100 * best['top1_agreement']:.1f} %",
            f"{100 * recall['accuracy']:.1f} %" if recall else "",
        ])  # fmt: skip
    return ARMS, rows


def tokens(report: Entry) -> tuple[list[str], list[list[str]]]:
    """How soon a start from the teacher is where the random start ends, at the best rates of both.

    Which learning rate is best is decided at the end for the random start, and by the tokens needed
    for the other: both get what serves them.
    """
    groups = by_arm(report["students"])
    rows = []
    for random, ended in groups.items():
        if random.init != "random" or random.trainable != "attention":
            continue
        target = validation_kl(ended[0])
        spent = tokens_to_reach(ended[0], target)
        if spent is None:  # no validation of it was a number
            continue
        for arm, tried in groups.items():
            same = (arm.attention, arm.shape) == (random.attention, random.shape)
            if arm.init != "teacher" or arm.trainable != "attention" or not same:
                continue
            needed = [n for n in (tokens_to_reach(one, target) for one in tried) if n is not None]
            found = f"{min(needed) / 1e6:.2f}" if needed else "never"
            share = f"{100 * min(needed) / spent:.1f} %" if needed else ""
            rows.append([
                random.attention, _stages(random), f"{target:.3f}", f"{spent / 1e6:.2f}",
                _stages(arm), found, share,
            ])  # fmt: skip
    return TOKENS, rows


def curve(report: Entry) -> tuple[list[str], list[list[str]]]:
    """Validation KL along stage 2, at the first validation after each part of it."""
    header = ["validation KL (M tokens of stage 2)", "start"]
    header += [f"{100 * part:g} %" for part in PARTS[1:]]
    rows = []
    for name, student in report["students"].items():
        if points := validations(student):
            shown = (next(p for p in points if p[0] >= part * points[-1][0]) for part in PARTS)
            rows.append([name, *(f"{kl:.3f} ({spent / 1e6:.1f})" for spent, kl in shown)])
    return header, rows


def fits(report: Entry) -> tuple[list[str], list[list[str]]]:
    """MLA right after the edit, by the way its initialization was made."""
    teacher = report["teacher"]["perplexity"]

    def excess(student: Entry) -> float | None:
        perplexity = student["perplexity"]["after_edit"]
        return None if perplexity is None else perplexity - teacher

    found = {}
    for student in report["students"].values():
        arm = arm_of(student)
        if arm is None or arm.attention != "mla" or "kl_after_edit" not in student:
            continue
        fit = student["runs"]["edit"]["student_attention"]["fit"]
        found["random" if arm.init == "random" else fit] = student
    svd = excess(found["svd"]) if "svd" in found else None
    rows = []
    for name, student in found.items():
        above = excess(student)
        rows.append([
            name, number(student["perplexity"]["after_edit"], ",.1f"), number(above, ",.1f"),
            f"{above / svd:.3f}" if above is not None and svd else "",
            number(student["kl_after_edit"], ".3f"),
            f"{100 * student['top1_agreement_after_edit']:.1f} %",
        ])  # fmt: skip
    return FITS, rows


def _stages(arm: Arm) -> str:
    return f"stage{'s' if '+' in arm.stages else ''} {arm.stages}"


def rate(lr: float) -> str:
    """A learning rate as one writes it, such as 6e-4 and 1.5e-3."""
    number = f"{lr:.1e}".replace("e-0", "e-")
    return number.replace(".0e", "e")
