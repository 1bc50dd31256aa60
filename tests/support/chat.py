"""Tokenizers with chat templates of three families, and conversations whose tokens are counted."""

import functools
from pathlib import Path

import pytest

TEMPLATES = Path(__file__).parent / "chat_templates"
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
]


def user(content):
    return {"role": "user", "content": content}


def answer(content, **fields):
    return {"role": "assistant", "content": content, **fields}


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TOOL_TURNS = [user("sum?"), answer(None, tool_calls=[CALL]), {"role": "tool", "content": "3"}]
# A row, and the tokens that the assistant writes with Qwen3's, Llama 3's and SmolLM2's template
# where every character is a token, and <think> and its like are one. Zero: refused.
# Qwen3 puts <think> \n thinking \n </think> \n \n before the last answer: 6 and the thinking.
# The call is {"name": "add", "arguments": {"a": 1}}, 38 characters, in Qwen3 between
# <tool_call> \n and \n </tool_call>; Llama 3's has "parameters" in place of "arguments".
CONVERSATIONS = [
    ({"messages": [user("2+2?"), answer("4")]}, (6 + 1 + 1, 1 + 1, 1 + 1)),
    (
        {"messages": [{"role": "system", "content": "Be brief."}, user("Fine?"), answer("ok")]},
        (6 + 2 + 1, 2 + 1, 2 + 1),
    ),
    (
        {"messages": [user("a?"), answer("yes"), user("b?"), answer("no")]},
        (3 + 1 + 6 + 2 + 1, 3 + 1 + 2 + 1, 3 + 1 + 2 + 1),
    ),
    (
        {"messages": [user("1+1?"), answer("2", reasoning_content="1+1")]},
        (6 + 3 + 1 + 1, 1 + 1, 1 + 1),
    ),
    (
        {
            "messages": [
                *(user("x?"), answer("x", reasoning="ab")),
                user("y?"),
                answer([{"type": "thinking", "thinking": "c"}, {"type": "text", "text": "yz"}]),
            ]
        },
        (1 + 1 + 6 + 1 + 2 + 1, 1 + 1 + 2 + 1, 1 + 1 + 2 + 1),
    ),
    (
        {"messages": [*TOOL_TURNS, answer("3")], "tools": TOOLS},
        (2 + 38 + 2 + 1 + 6 + 1 + 1, 39 + 1 + 1 + 1, 0),
    ),
    (
        {
            "messages": [
                TOOL_TURNS[0],
                answer("", reasoning_content="tt", tool_calls=[CALL]),
                TOOL_TURNS[2],
                *(answer("r"), user("more?"), answer("z")),
            ],
            "tools": TOOLS,
        },
        (2 + 38 + 2 + 1 + 1 + 1 + 6 + 1 + 1, 39 + 1 + 1 + 1 + 1 + 1, 0),
    ),
    (
        {"messages": [user("sure?"), answer("<think>\nhm\n</think>\n\nyes")]},
        (6 + 2 + 3 + 1, 6 + 2 + 3 + 1, 6 + 2 + 3 + 1),
    ),
    (
        {
            "system": "Two lines.",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a\nb"}],
        },
        (6 + 3 + 1, 3 + 1, 3 + 1),
    ),
    ({"messages": [user("trim?"), answer(" ok \n")]}, (6 + 5 + 1, 2 + 1, 5 + 1)),
]
# Thinking that the template does not show.
LEFT_OUT = [(0, 0, 0)] * 3 + [(0, 1, 1), (1, 2, 2), (0, 0, 0), (1, 1, 0)] + [(0, 0, 0)] * 3
FAMILIES = ("qwen3", "llama3", "smollm2")


def template(family):
    return (TEMPLATES / f"{family}.jinja").read_text()


def save_tokenizer(folder, chat_template, *, vocab_size=0):
    """A byte-level tokenizer: every byte a token, or merged up to a size of the vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.support.tokenizers import corpus

    bpe = Tokenizer(models.BPE())
    # Line ends together, as Llama 3 has them, and words with the space before them.
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s?[^\s]+|\s+"), "isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3's and Qwen3's
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or 256 + len(SPECIAL),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"\n\n{text}\n\n" for text in corpus(50)] if vocab_size else []
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
    """A function from a family's name to the directory of a tokenizer with its template."""

    @functools.cache
    def make(family, vocab_size=0):
        folder = tmp_path_factory.mktemp(f"chat-{family}")
        return save_tokenizer(folder, template(family), vocab_size=vocab_size)

    return make
