"""Which tokens of a conversation are the assistant's: counted by hand, and found by rendering."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.data.chat import ChatConfig, encode_conversations, load_template, tokens_of
from megatron_attnedit.data.conversations import parse_conversation
from megatron_attnedit.data.tokenizer import load_tokenizer
from megatron_attnedit.errors import UserError
from tests.support.chat import (
    CONVERSATIONS,
    FAMILIES,
    LEFT_OUT,
    SPECIAL,
    answer,
    save_tokenizer,
    template,
    user,
)


def encode(folder, row, eod=None, **options):
    """Ids and mask of one row."""
    conversation = parse_conversation("a.jsonl:1", row)
    (sample,) = encode_conversations(folder, ChatConfig(**options), eod, [conversation])
    if isinstance(sample, BadRow):
        raise sample
    return sample


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_counted_by_hand(chat_tokenizer, family):
    folder, column = chat_tokenizer(family), FAMILIES.index(family)
    stock = AutoTokenizer.from_pretrained(folder)
    assert len(CONVERSATIONS) == len(LEFT_OUT) == 10
    for (row, expected), left_out in zip(CONVERSATIONS, LEFT_OUT, strict=True):
        if not expected[column]:
            with pytest.raises(BadRow, match="message 2: the template leaves out the tool call"):
                encode(folder, row)
            continue
        sample = encode(folder, row)
        conversation = parse_conversation("", row)
        stock_ids = stock.apply_chat_template(
            conversation.messages, tools=conversation.tools, return_dict=False
        )
        assert sample.ids.tolist() == stock_ids
        assert int(sample.mask.sum()) == expected[column], stock.decode(sample.ids)
        assert sample.notes["thinking_left_out"] == left_out[column]
        every = encode(folder, row, loss_on="all")
        assert every.mask is None and every.ids.tolist() == stock_ids


def counted_text(folder, sample):
    return load_tokenizer(folder).decode(sample.ids[sample.mask == 1].tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vocab_size", [0, 330])
def test_what_counts_is_what_the_model_writes(chat_tokenizer, family, vocab_size):
    """Behind the prompt as generation has it, up to the token that ends the turn."""
    folder = chat_tokenizer(family, vocab_size)
    stock = AutoTokenizer.from_pretrained(folder)
    end = "<|eot_id|>" if family == "llama3" else "<|im_end|>"
    text = "the layer\n\nits teacher"
    sample = encode(folder, {"messages": [user("the student\n"), answer(text)]})
    thinking = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert counted_text(folder, sample) == f"{thinking}{text}{end}"
    prompt = stock.apply_chat_template(
        [user("the student\n")], add_generation_prompt=True, return_dict=False
    )
    assert np.flatnonzero(sample.mask)[0] == len(prompt)
    assert sample.ids[: len(prompt)].tolist() == prompt
    if vocab_size:  # a token of white space alone ends Llama 3's prompt, and its offsets are empty
        (two_lines,) = stock.encode("\n\n")
        assert (prompt[-1] == two_lines) == (family == "llama3")


MARKED = {
    "qwen3": (
        ("{%- if loop.index0 > ns.last", "{%- generation %}{%- if loop.index0 > ns.last"),
        (
            "{{- '<|im_end|>\\n' }}\n{%- elif message.role == 'tool' %}",
            "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
            "\n{%- elif message.role == 'tool' %}",
        ),
    ),
    "smollm2": (
        (
            "message.role + '\\n' + message.content + '<|im_end|>\\n' }}",
            "message.role + '\\n' }}{%- if message.role == 'assistant' %}{%- generation %}"
            "{{- message.content + '<|im_end|>' }}{%- endgeneration %}"
            "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}",
        ),
    ),
}


@pytest.mark.parametrize("family", MARKED)
def test_markers_and_prefixes_agree(chat_tokenizer, tmp_path, family):
    text = template(family)
    for old, new in MARKED[family]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "marked.jinja").write_text(text)
    compared = 0
    for row, expected in CONVERSATIONS:
        for folder in (chat_tokenizer(family), chat_tokenizer(family, 330)):
            if expected[FAMILIES.index(family)]:
                prefixes = encode(folder, row)
                marked = encode(folder, row, chat_template=str(tmp_path / "marked.jinja"))
                assert prefixes.ids.tolist() == marked.ids.tolist()
                assert prefixes.mask.tolist() == marked.mask.tolist(), row
                compared += 1
    assert compared >= 16


BAD_TEMPLATES = {
    # Only the last turn has an end, and the number of turns stands at the beginning.
    "end": ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}<|im_end|>", "prefixes"),
    "number": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ messages | length }}"
        "{% endfor %}",
        "prefixes",
    ),
    "silent": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "prefixes consistently",
    ),
    "empty": ("{% generation %}{% endgeneration %}x", "the template marks no completion"),
    "strict": ("{{ raise_exception('no thanks') }}", "refuses it: no thanks"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_bad_templates_of_a_row(chat_tokenizer, tmp_path, name):
    text, message = BAD_TEMPLATES[name]
    (tmp_path / "a.jinja").write_text(text)
    row = {"messages": [user("a?"), answer("yes"), user("b?"), answer("no")]}
    with pytest.raises(BadRow, match=message) as caught:
        encode(chat_tokenizer("smollm2"), row, chat_template=str(tmp_path / "a.jinja"))
    assert str(caught.value).startswith("a.jsonl:1: ") and "\n" not in str(caught.value)


def test_templates_that_are_none(tmp_path, hf_tokenizer, sentencepiece_model, chat_tokenizer):
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    for folder, file, message in (
        (hf_tokenizer, None, f"--tokenizer {hf_tokenizer}: the tokenizer has no chat template"),
        (sentencepiece_model, None, "the tokenizer has no chat template"),
        (hf_tokenizer, "none.jinja", "none.jinja: No such file"),
        (hf_tokenizer, "latin.jinja", "latin.jinja: not UTF-8"),
        (hf_tokenizer, "bad.jinja", "bad.jinja: its chat template: "),
    ):
        config = ChatConfig(chat_template=file and str(tmp_path / file))
        with pytest.raises(UserError, match=message) as caught:
            load_template(folder, config)
        assert "\n" not in str(caught.value)
    for options, message in (
        ({"loss_on": "x"}, "--loss-on x: expected one of completion, all"),
        ({"over_long": "x"}, "--over-long x: expected one of"),
        ({"template_variables": "[]"}, "--chat-template-kwargs .*expected a JSON object"),
        ({"seq_length": -1}, "--seq-length -1"),
    ):
        with pytest.raises(UserError, match=message):
            ChatConfig(**options)


def test_variables_of_a_template(chat_tokenizer):
    folder = chat_tokenizer("llama3")
    row, variables = CONVERSATIONS[0][0], json.dumps({"date_string": "1 Jan 2026"})
    text = load_tokenizer(folder).decode(encode(folder, row, template_variables=variables).ids)
    assert "Today is 1 Jan 2026." in text


def test_characters_of_several_bytes(chat_tokenizer):
    """Tokens that are a part of a character have the offsets of the whole."""
    folder = chat_tokenizer("smollm2")
    text = "\u6f22\U0001f600"
    sample = encode(folder, {"messages": [user("\u00e9"), answer(text)]})
    assert int(sample.mask.sum()) == 3 + 4 + 1
    assert counted_text(folder, sample) == text + "<|im_end|>"


def test_a_token_across_the_border_is_the_prompts(tmp_path):
    """Generation begins behind it, so the model never writes it as a whole."""
    folder = save_tokenizer(tmp_path / "a", template("smollm2"), vocab_size=330)
    tokenizer = load_tokenizer(folder)
    text = "the\n\nlayer"
    assert len(SPECIAL) == 13 and len(tokenizer.encode("\n\n")) == 1
    mask = tokens_of(tokenizer, text, [(4, len(text))]).mask  # between the two line ends
    assert int(mask.sum()) == len(tokenizer.encode("layer"))
    # Nor where the space in front, which the tokenizer's own offsets leave out, is the prompt's.
    assert len(tokenizer.encode("the layer")) == 2
    assert tokens_of(tokenizer, "the layer", [(4, 9)]).mask.tolist() == [0, 0]
    assert tokens_of(tokenizer, "the layer", [(3, 9)]).mask.tolist() == [0, 1]


def test_end_of_document_and_length(chat_tokenizer):
    folder = chat_tokenizer("smollm2")
    eod, row = load_tokenizer(folder).eod, CONVERSATIONS[2][0]
    whole, bare = encode(folder, row, eod), encode(folder, row)
    assert whole.ids.tolist() == [*bare.ids.tolist(), eod]
    assert whole.mask.tolist() == [*bare.mask.tolist(), 0]
    length, first = len(whole.ids), int(np.flatnonzero(whole.mask)[0])
    assert encode(folder, row, eod, seq_length=length).notes["over_long"] == 0
    cut = encode(folder, row, eod, seq_length=length - 4)
    assert cut.ids.tolist() == [*bare.ids.tolist()[: length - 5], eod]
    assert (cut.notes["over_long"], cut.notes["truncated_tokens"]) == (1, 4)
    assert int(cut.mask.sum()) == int(whole.mask[: length - 5].sum())
    for options in ({"seq_length": length - 1, "over_long": "skip"}, {"seq_length": first + 1}):
        gone = encode(folder, row, eod, **options)
        assert not len(gone.ids) and gone.notes["over_long_left_out"] == 1
    assert len(encode(folder, row, eod, seq_length=first + 1, loss_on="all").ids) == first + 1
