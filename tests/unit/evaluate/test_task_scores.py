"""Errors of scores, items against the teacher's, and the values of answers."""

import copy
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch

from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.mean import Mean, mean_and_error
from megatron_attnedit.evaluate.tasks.answers import LocalModel, Server
from megatron_attnedit.evaluate.tasks.generated import run
from megatron_attnedit.evaluate.tasks.long_tasks import LONG_TASKS, share_of
from megatron_attnedit.evaluate.tasks.scores import Score, against, scored
from megatron_attnedit.evaluate.tasks.short_tasks import LETTERS, SHORT_TASKS, choice, letter_of
from megatron_attnedit.evaluate.tasks.source import Source
from megatron_attnedit.evaluate.tasks.tables import letter_rows, rows

LENGTH = 320


def test_a_mean_has_the_error_of_a_sample():
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    mean, stderr = mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean_and_error([0.5]) == (0.5, None)


def test_a_mean_in_pieces_is_that_of_all():
    """Far from 0, where a sum of squares would have no digits left."""
    values = [1e8 + i % 7 for i in range(50)]
    mean = Mean()
    for start, end in ((0, 3), (3, 4), (4, 50)):
        mean.add(torch.tensor(values[start:end], dtype=torch.float64))
    stderr = statistics.stdev(values) / 50**0.5
    assert mean.value() == statistics.mean(values)
    assert mean.stderr() == pytest.approx(stderr, rel=1e-9)
    for numbers in ([math.inf, 1.0], [2.0]):
        mean.add(torch.tensor(numbers))
    assert mean.value() == math.inf


@pytest.mark.parametrize("sign", [1, -1])
def test_items_are_compared_with_those_of_the_teacher(sign):
    student, teacher = [1.0, 0.0, 0.0, 1.0, 1.0, 0.5], [0.0, 1.0, 0.0, 1.0, 0.0, 0.5]
    found = against(student, teacher, sign)
    assert found["difference"] == pytest.approx(1 / 6)
    differences = [1, -1, 0, 0, 1, 0]
    assert found["difference_stderr"] == pytest.approx(statistics.stdev(differences) / 6**0.5)
    shares = [found["wins"], found["ties"], found["losses"]]
    expected = [2 / 6, 3 / 6, 1 / 6]
    assert shares == pytest.approx(expected if sign == 1 else expected[::-1])
    assert found["ties_stderr"] == pytest.approx(math.sqrt(0.3 / 6))


def test_a_score_without_items_has_no_comparison():
    teacher, student = (Score("ppl", "word", 3, value, None) for value in (2.0, 3.0))
    assert "difference" not in student.record(teacher)
    both = scored("a", "acc", [1.0, 0.0]).record(scored("a", "acc", [1.0, 1.0]))
    assert both["difference"] == -0.5 and both["is_share"]
    entry = {"tasks": [student.record(teacher)], "tasks_through": "transformers"}
    report = {"teacher": {}, "students": {"a": entry}}
    assert rows(report) == [["a", "ppl", "word", "-", "3", "3", *"----", "transformers"]]
    assert letter_rows(report) == []


@pytest.fixture(scope="module")
def source(embedded_tokens) -> Source:
    return Source(*embedded_tokens, chat_template=False)


@pytest.mark.parametrize("name", LONG_TASKS)
def test_a_prompt_has_its_length_and_its_seed(source, name):
    make, _ = LONG_TASKS[name]
    length = 700 if name == "common_words" else LENGTH
    prompts = [make(source, random.Random(seed), length).prompt for seed in (1, 1, 2)]
    assert [len(prompt) for prompt in prompts] == [length] * 3
    assert prompts[0] == prompts[1] != prompts[2]


def test_a_fact_stands_whole_between_two_sentences(source):
    make, _ = LONG_TASKS["needles"]
    text = source.tokenizer.decode(make(source, random.Random(5), 900).prompt)
    for fact in text.split(" The secret number of ")[1:-1]:
        assert fact.partition(". ")[0].split(" is ")[1][:7].isdecimal()
    last_signs = [part[-1] for part in text.split(" The secret number of ")[:-2]]
    assert set(last_signs) <= set(".!?\n")


def test_common_words_are_as_common_as_said(source):
    question = LONG_TASKS["common_words"][0](source, random.Random(3), 900)
    text = source.tokenizer.decode(question.prompt)
    words = text.split("List: ")[1].split("\n")[0].split(", ")
    counts = {word: words.count(word) for word in words}
    common = [word for word, count in counts.items() if count == 20]
    assert len(common) == 5 and set(counts.values()) == {2, 20}
    assert question.value(" ".join(common)) == 1
    assert question.value(f"{common[0]}, {common[1]}") == pytest.approx(0.4)


class Reader:
    """Answers by looking into the prompt, or always the same."""

    through = "test"

    def __init__(self, source, always=None):
        self.source, self.always = source, always

    def complete(self, prompts, new_tokens):
        return [self.always or self.answer(self.source.tokenizer.decode(p)) for p in prompts]

    def answer(self, text):
        last = text.rsplit("\n", 1)[1]
        if last.startswith("Answer:"):
            block = text.rsplit("\n\n", 1)[1]
            asked = block.split("What is the number of ")[1].split("?")[0]
            number = block.split(f"The number of {asked} is ")[1].split(".")[0]
            return f" {block.split(f'. {number}')[0][-1]}"
        if last.startswith("The same text again:"):
            given = last.removeprefix("The same text again: ")
            return text.split(f"Text: {given}")[1].split("\n")[0]
        if last.startswith("JSON:"):
            name, number = text.rsplit("The number of ", 1)[1].split("\n")[0][:-1].split(" is ")
            return f' {{"name": "{name}", "number": {number}}}\n\nSentence'
        if "secret" in last:
            key = last.split("secret number of ")[-1].split(" is")[0]
            return text.split(f"The secret number of {key} is ")[1][:7]
        if "value" in last:
            body = text.rsplit("\n\n", 1)[0] + text  # the example's names are wrong answers
            return ", ".join(p.split(" =")[0] for p in body.split("VAR ") if " = " in p)
        words = text.split("List: ")[1].split("\n")[0].split(", ")
        return ", ".join(sorted(set(words), key=words.count)[-5:])


def scores_of(source, always=None):
    names = [*LONG_TASKS, "choice", *SHORT_TASKS]
    found = run(Reader(source, always), source, names, [900], samples=3, seed=7)
    return {score.task: score for score in found}


def test_who_reads_the_prompt_has_everything(source):
    for name, score in scores_of(source).items():
        assert score.score == 1 and score.stderr == 0 and score.n == 3, name
        assert score.length == (900 if name in LONG_TASKS else None)


def test_who_answers_one_letter_has_a_quarter(source):
    scores = scores_of(source, " A. 12")
    assert scores["choice"].score == 0.25
    rates = {name: rate["rate"] for name, rate in scores["choice"].details["letters"].items()}
    assert rates == {"A": 1, "B": 0, "C": 0, "D": 0, "none": 0}
    assert {s.score for s in scores.values() if s.task != "choice"} == {0}


def test_every_letter_is_right_once(source):
    prompts = [source.tokenizer.decode(p) for p in choice(source, random.Random(11))]
    assert [Reader(source).answer(text).strip() for text in prompts] == list(LETTERS)
    solved = {text.rsplit("\n\n", 1)[0] for text in prompts}
    assert len(solved) == 1
    answers = [line[-1] for line in solved.pop().split("\n") if "Answer" in line]
    assert sorted(answers) == list(LETTERS)


@pytest.mark.parametrize(
    ("answer", "letter"), [(" B", "B"), ("\nD. 14", "D"), ("A number", ""), ("Both", ""), ("", "")]
)
def test_the_letter_of_an_answer(answer, letter):
    assert letter_of(answer) == letter


def test_values_of_answers(source):
    copy, form = (SHORT_TASKS[name][0](source, random.Random(1)) for name in ("copy", "format"))
    words = Reader(source).answer(source.tokenizer.decode(copy.prompt)).split()
    assert copy.value(" ".join([*words, "more"])) == 1
    assert copy.value(" ".join([*words[:3], "x", *words[4:]])) == pytest.approx(3 / len(words))
    assert copy.value("") == 0
    right = Reader(source).answer(source.tokenizer.decode(form.prompt)).strip().split("\n")[0]
    assert form.value(f"```json\n{right}\n```") == 1
    assert form.value(right.replace('"number"', "number")) == form.value("") == 0
    assert form.value("[" * 10_000) == 0
    assert share_of(["Ab", "c"])("AB d") == 0.5


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<no-thoughts>"
    "{% endif %}{% endif %}"
)


def test_a_chat_template_stands_around_the_question(embedded_tokens):
    tokenizer, tokens = copy.deepcopy(embedded_tokens[0]), embedded_tokens[1]
    with pytest.raises(UserError, match="--apply-chat-template: .* has no chat template"):
        Source(tokenizer, tokens, chat_template=True)
    tokenizer.chat_template = TEMPLATE
    chat = Source(tokenizer, tokens, chat_template=True)
    prompt = LONG_TASKS["needle"][0](chat, random.Random(1), LENGTH).prompt
    text = tokenizer.decode(prompt)
    assert len(prompt) == LENGTH and text.startswith("<user>Some secret numbers")
    middle = "in the text above?</user><assistant><no-thoughts>The secret number of "
    assert middle in text and text.endswith(" is")
    asked = [tokenizer.decode(p) for p in choice(chat, random.Random(1))]
    assert all(text.endswith("</user><assistant><no-thoughts>Answer:") for text in asked)


@pytest.mark.parametrize(
    ("kind", "length", "together"),
    # 2 GiB on a CPU, 8 elsewhere, of 138,240 bytes a token.
    [("cpu", 512, 30), ("cpu", 8192, 1), ("cpu", 90_000, 1), ("x", 512, 64), ("x", 8192, 7)],
)
def test_so_many_prompts_at_a_time_as_fit_into_memory(kind, length, together):
    config = SimpleNamespace(num_hidden_layers=30, hidden_size=576)
    device = SimpleNamespace(type=kind)
    model = SimpleNamespace(config=config, device=device, dtype=torch.float32)
    assert LocalModel(model, None, 1)._together(length) == together


@pytest.mark.parametrize("answer", [{}, {"choices": [{"index": 0}]}, [], {"choices": None}])
def test_an_answer_of_another_interface(monkeypatch, answer):
    monkeypatch.setattr("megatron_attnedit.evaluate.tasks.answers.call", lambda *_: answer)
    with pytest.raises(UserError, match="--server u: no answer of OpenAI's interface"):
        Server("u", "m", None, 1).complete([[1]], 2)
