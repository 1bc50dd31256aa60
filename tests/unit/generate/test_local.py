"""Completions by transformers in this process: draws of each row's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_attnedit.data.tokenizer import load_tokenizer as training_tokenizer
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.loading import load_model, load_tokenizer
from megatron_attnedit.generate.completions import Task
from megatron_attnedit.generate.local import LocalModel, RowNoise
from megatron_attnedit.generate.prompts import Prompt
from megatron_attnedit.generate.settings import Sampling
from tests.support.chat import user
from tests.support.models import tiny_hf_dir
from tools import generate_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory, chat_tokenizer):
    """A random model of the tokens of a chat tokenizer."""
    source = chat_tokenizer("smollm2")
    words = training_tokenizer(source).vocab_size
    folder = tiny_hf_dir(tmp_path_factory.mktemp("model") / "hf", vocab_size=words)
    for file in Path(source).iterdir():
        shutil.copy(file, folder)
    return folder


def model_of(directory, batch_size=3, **options):
    model = load_model(directory, torch.float32, CPU)
    sampling = Sampling(max_new_tokens=12, **options)
    tokenizer = load_tokenizer(directory)
    # Random bytes are no text: what is compared are the tokens.
    tokenizer.decode = lambda row, **_: " ".join(map(str, row))
    return LocalModel(directory, model, tokenizer, sampling, batch_size)


def tasks(count=5):
    return [Task(Prompt(str(i), f"a:{i}", [user("a" * i)], None), 0, 100 + i) for i in range(count)]


def texts(model, asked):
    return [completion.message["content"] for _, completion in model.complete(asked)]


def test_rows_beside_each_other_change_nothing(directory):
    for options in ({}, {"temperature": 0.5, "top_k": 20, "top_p": 0.8}, {"temperature": 0}):
        one, three = (texts(model_of(directory, size, **options), tasks()) for size in (1, 3))
        assert one == three
        assert len(set(one)) > 2 or options == {"temperature": 0}  # a dull model's likeliest
    sampled, other = texts(model_of(directory), tasks()), texts(model_of(directory), tasks()[::-1])
    assert sampled == other[::-1]
    greedy = texts(model_of(directory, temperature=0), tasks())
    assert texts(model_of(directory, top_k=1), tasks()) == greedy != sampled


def test_greedy_is_the_likeliest_token_of_full_forwards(directory):
    model = model_of(directory, temperature=0)
    (task,) = tasks(3)[2:]
    ids = model._ids(task)
    start, ends = len(ids), model._ends()
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            ids.pop()
            break
    assert texts(model, [task]) == [model.tokenizer.decode(ids[start:])]


def test_draws_have_the_distribution(directory):
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    rows = 4000

    def shares(**options):
        noise = RowNoise(list(range(rows)), Sampling(**options), CPU)
        drawn = noise(torch.zeros(rows, 1), logits.expand(rows, -1)).argmax(-1)
        return torch.bincount(drawn, minlength=5) / rows

    for temperature in (1.0, 0.5, 2.0):
        expected = (logits / temperature).softmax(-1)
        assert (shares(temperature=temperature) - expected).abs().max() < 0.025
    two = logits[:2].softmax(-1)
    assert (shares(top_k=2)[:2] - two).abs().max() < 0.025 and shares(top_k=2)[2:].sum() == 0
    assert shares(top_p=0.5)[0] == 1


def test_ends_and_lengths(directory):
    model = model_of(directory)
    (found,) = (completion for _, completion in model.complete(tasks(1)))
    assert found.finish_reason == "length"
    ids = [int(word) for word in found.message["content"].split()]
    model.model.generation_config.eos_token_id = [ids[3]]
    (cut,) = (completion for _, completion in model.complete(tasks(1)))
    expected = " ".join(map(str, ids[: ids.index(ids[3])]))
    assert (cut.finish_reason, cut.message["content"]) == ("stop", expected)
    long = Task(Prompt("x", "a:9", [user("a" * 250)], None), 0, 1)
    (_, first), (_, second) = model.complete([long, *tasks(1)])
    assert first.kind == "longer than the model's positions" and str(first).startswith("a:9: ")
    assert second == cut
    model.tokenizer.chat_template = None
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        LocalModel(directory, model.model, model.tokenizer, model.sampling, 1)


def test_the_tool(directory, tmp_path, monkeypatch, capsys):
    model, prompts = shutil.copytree(directory, tmp_path / "model"), tmp_path / "prompts.jsonl"
    ends = {"eos_token_id": list(range(0, 260, 8))}
    (model / "generation_config.json").write_text(json.dumps(ends))
    rows = [{"messages": [user("a" * i)]} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--prompts", prompts, "--model", model, "--batch-size", 4, "--output"]
    words += [tmp_path / "out", "--max-new-tokens", 9, "--samples", 2, "--temperature", 20]
    monkeypatch.setattr(generate_data, "start_logging", lambda: None)
    monkeypatch.setattr("sys.argv", ["generate_data.py", *map(str, words)])
    generate_data.main()
    kept, left = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("data.jsonl", "left_out.jsonl")
    )
    assert len(kept) + len(left) == 12 and len(kept) > 2 and len(left) > 2
    assert f"{len(kept)} completions of 6 prompts" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- through: transformers" in card and "- weights sha256: " in card
