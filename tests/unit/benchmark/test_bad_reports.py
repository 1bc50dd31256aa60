"""Reports, files of data and marks of pages that no table can be made of: one line says why."""

import json
import sys

import pytest

from megatron_attnedit.errors import UserError
from tools.benchmark import results
from tools.benchmark.published import add_report, read_report
from tools.benchmark.tables import filled

STUDENT = {
    "perplexity": {"after_stage1": 9.0}, "perplexity_ratio": 1.8, "kl": 0.1, "top1_agreement": 0.9,
    "kv_bytes_per_token": 2048, "kv_fraction": 0.125,
    "metrics": {"stage1": [{"tokens": 100, "seconds": 1.0, "loss": 0.5}]},
    "runs": {"stage1": {"lr": 1e-3, "seed": 3}},
}  # fmt: skip
TEACHER = {"name": "t", "perplexity": 5.0, "kv_bytes_per_token": 16384}
REPORT = {
    "data": {"file": "a.jsonl"}, "dtype": "bfloat16", "teacher": TEACHER,
    "students": {"a": STUDENT},
}  # fmt: skip
BEGIN, END = "<!-- table: summary kept.json -->", "<!-- end of table -->"


def without(entry, *names):
    return {key: value for key, value in entry.items() if key not in names}


def of(student):
    return {**REPORT, "students": {"a": student}}


def logged(lines):
    return of({**STUDENT, "metrics": {"stage1": lines}})


BAD = {
    ": not UTF-8": b"\xff",
    ": not valid JSON": b"{",
    ": expected an object": [],
    ": no teacher, students, data, dtype;": {},
    ": no students;": without(REPORT, "students"),
    ": students: expected an object": {**REPORT, "students": []},
    ": dtype: expected a string": {**REPORT, "dtype": 1},
    ": teacher: no name;": {**REPORT, "teacher": without(TEACHER, "name")},
    ": teacher: perplexity: expected a number": {
        **REPORT, "teacher": {**TEACHER, "perplexity": None}
    },
    ": student a: expected an object": of(1),
    ": student a: no metrics, kl;": of(without(STUDENT, "metrics", "kl")),
    ": student a: runs: expected an object": of({**STUDENT, "runs": []}),
    ": student a: runs of edit: expected an object": of({**STUDENT, "runs": {"edit": 1}}),
    ": student a: metrics of stage1: expected a list": logged([]),
    ": student a: metrics of stage1: expected an object": logged([1]),
    ": student a: metrics of stage1: no tokens;": logged([{"seconds": 1}]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_file_that_is_no_report_is_refused(tmp_path, message):
    file, bad = tmp_path / "kept.json", BAD[message]
    before = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    file.write_bytes(before)
    for use in (
        lambda: read_report(file),
        lambda: add_report(REPORT, file),
        lambda: filled(f"{BEGIN}\n{END}", tmp_path),
    ):
        with pytest.raises(UserError) as refused:
            use()
        text = str(refused.value)
        assert text.startswith(f"{file}{message}") and "\n" not in text
    assert file.read_bytes() == before


def test_null_is_a_number_that_json_lacks(tmp_path):
    file, report = tmp_path / "report.json", of({**STUDENT, "kl": None, "perplexity_ratio": None})
    file.write_text(json.dumps(report))
    assert read_report(file) == report


def test_a_table_whose_figures_were_not_kept(tmp_path):
    add_report(of({**STUDENT, "runs": {"stage1": {"seed": 3}}}), tmp_path / "kept.json")
    with pytest.raises(UserError, match=r"^<!-- table: cost kept.json -->: .*kept.json lacks 'lr'"):
        filled(f"{BEGIN.replace('summary', 'cost')}\n{END}", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        f"{BEGIN}\nold\n",
        f"{BEGIN} old\n{END}\n",
        f"{BEGIN}\nold\n{BEGIN.replace('summary', 'cost')}\n{END}\n",
    ],
)
def test_a_mark_without_an_end_is_refused(tmp_path, monkeypatch, text):
    add_report(REPORT, tmp_path / "kept.json")
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr(sys, "argv", ["results.py", "fill", str(page), "--data", str(tmp_path)])
    with pytest.raises(UserError) as refused:
        results.main()
    wanted = f"{page}: {BEGIN}: expected a line of its own and {END} after it"
    assert str(refused.value) == wanted and page.read_text() == text


def test_nothing_is_written_of_bad_reports_or_names(tmp_path, monkeypatch):
    good, bad, kept = (tmp_path / f"{name}.json" for name in ("good", "bad", "kept"))
    students = dict.fromkeys(("a", "other"), REPORT["students"]["a"])
    good.write_text(json.dumps({**REPORT, "students": students}))
    bad.write_text("{")
    command = ["results.py", "add", "--data", kept, good]
    for flags, message in (
        ([bad], f"{bad}: not valid JSON"),
        (["--rename", "a=c", "b=d"], "--rename b=d: no report has a student b"),
        (["--rename", "a=other"], f"{kept}: two of a, other get one name"),
    ):
        monkeypatch.setattr(sys, "argv", list(map(str, [*command, *flags])))
        with pytest.raises(UserError) as refused:
            results.main()
        assert str(refused.value).startswith(message) and not kept.exists()
