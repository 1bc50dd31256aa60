"""No tool runs, or offers to run, what a directory or a file brings with it."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_attnedit.convert.legacy_checkpoint import _load
from megatron_attnedit.data import tokenizer as training_tokenizer
from megatron_attnedit.errors import UserError, one_line
from megatron_attnedit.export.loading import load_model, load_tokenizer
from tests.support.models import tiny_hf_dir
from tests.support.tokenizers import hf_tokenizer  # noqa: F401

ROOT = Path(__file__).parents[2]
CALLS = {
    "from_pretrained": "trust_remote_code",
    "from_config": "trust_remote_code",
    "torch.load": "weights_only",
    "numpy.load": "allow_pickle",
}
# One call in it reads what torch does not, by a list of names instead of weights_only:
# tests/unit/convert/test_plain_pickle.py.
BY_A_LIST = "plain_pickle.py"
# Where a setting is handed on under another name.
SAFE = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False}


def unsafe_calls(source: str) -> list[int]:
    """Lines of calls that load something and leave to a default whether code may run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        if name == "load" and isinstance(node.func.value, ast.Name):
            name = f"{node.func.value.id}.load"
        setting = CALLS.get(name)
        if setting is None:
            continue
        given = {k.arg: getattr(k.value, "value", ...) for k in node.keywords}
        handed_on = None in given and f'"{setting}": {SAFE[setting]}' in source
        if given.get(setting, ...) is not SAFE[setting] and not handed_on:
            found.append(node.lineno)
    return found


def test_every_loading_call_says_that_no_code_may_run():
    folders = (ROOT / name for name in ("megatron_attnedit", "tools", "examples"))
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert len(files) > 150
    bad = {file.name: lines for file in files if (lines := unsafe_calls(file.read_text()))}
    (line,) = bad.pop(BY_A_LIST)
    assert bad == {}
    source = (ROOT / "megatron_attnedit" / "convert" / BY_A_LIST).read_text().splitlines()
    assert "pickle_module=allowed_only" in source[line] + source[line + 1]
    assert unsafe_calls("torch.load(x)\nA.from_pretrained(x, trust_remote_code=None)") == [1, 2]


CODE = "import os\nos.mkdir({ran!r})\nfrom transformers import {base} as Mine\n"


@pytest.fixture
def foreign(tmp_path, hf_tokenizer):  # noqa: F811
    """Model directories whose code makes a folder when it is imported."""
    ran = tmp_path / "ran"

    def make(kind):
        folder = tiny_hf_dir(tmp_path / kind, num_hidden_layers=1)
        for file in Path(hf_tokenizer).iterdir():
            shutil.copy(file, folder)
        config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
        if kind == "model":
            auto = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
            change(config, model_type="mine", architectures=["Mine"], auto_map=auto)
        elif kind == "tokenizer":
            change(tokenizer, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine"] * 2})
        else:
            (folder / "custom_generate").mkdir()
            code = CODE.format(ran=str(ran), base="Qwen3Config") + "def generate(*a, **k): pass\n"
            (folder / "custom_generate" / "generate.py").write_text(code)
        base = "Qwen3Config" if kind == "model" else "PreTrainedTokenizerFast"
        (folder / "mine.py").write_text(CODE.format(ran=str(ran), base=base))
        return folder

    return make


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def yes(monkeypatch, tmp_path):
    """A user who agrees to everything; afterwards nothing has run, and nobody was asked."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    yield
    assert asked == []
    assert not (tmp_path / "ran").exists()


def refused(words, function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and words in message
    assert "trust_remote_code" not in message and "weights_only" not in message
    return message


@pytest.mark.usefixtures("yes")
def test_code_of_a_model(foreign):
    folder = foreign("model")
    found = refused("needs code of its own", load_model, folder, torch.float32, torch.device("cpu"))
    assert str(folder) in found


TOKENIZER_LOADERS = [load_tokenizer, lambda folder: training_tokenizer.load_tokenizer(str(folder))]


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("load", TOKENIZER_LOADERS)
def test_code_of_a_tokenizer(foreign, load):
    folder = foreign("tokenizer")
    load(folder)  # by the class that transformers has for this model
    (folder / "config.json").unlink()
    training_tokenizer.load_tokenizer.cache_clear()
    assert str(folder) in refused("needs code of its own", load, folder)


@pytest.mark.usefixtures("yes")
def test_code_for_generation_is_left_alone(foreign):
    model = load_model(foreign("generation"), torch.float32, torch.device("cpu"))
    model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.usefixtures("yes")
def test_pickled_weights(tmp_path):
    evil = Evil(str(tmp_path / "ran"))
    folder = tiny_hf_dir(tmp_path / "hf", num_hidden_layers=1)
    (folder / "model.safetensors").unlink()
    torch.save({"x": evil}, folder / "pytorch_model.bin")
    arguments = (folder, torch.float32, torch.device("cpu"))
    refused("pytorch_model.bin is pickled; only .safetensors", load_model, *arguments)
    for name, content in {"plain": pickle.dumps(evil), "zip": None}.items():
        file = tmp_path / name
        if content:
            file.write_bytes(content)
        else:
            torch.save({"model": evil}, file)
        refused("it holds a pickled object", lambda f: _load(f, mmap=False), file)
    assert "(posix.mkdir)" in refused("", lambda f: _load(f, mmap=False), tmp_path / "zip")


def test_one_line_has_no_advice():
    assert one_line(ValueError("a\n  b ")) == "a b"
    assert one_line(KeyError()) == "KeyError()"
    assert len(one_line(ValueError("x" * 999))) == 200


def test_a_user_who_says_yes_is_not_asked(foreign, tmp_path):
    """The tool itself, with an answer on standard input, where transformers would ask."""
    folder, text = foreign("model"), tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the layer " * 50}) + "\n")
    flags = ["--teacher", folder, "--student", f"name=a,after_edit={folder}", "--text", text]
    flags += ["--output", tmp_path / "out", "--seq-length", "48"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/evaluate.py", *flags], input="y\n" * 9, text=True,
        capture_output=True, check=False, env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    expected = f"error: {folder}: cannot be loaded: it needs code of its own"
    assert done.stderr.splitlines()[-1].startswith(expected)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
