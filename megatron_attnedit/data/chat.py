"""Conversations to tokens, and which of them the assistant wrote."""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from megatron_attnedit.data.bad_rows import BadRow, BadRows
from megatron_attnedit.data.chat_template import ChatTemplate
from megatron_attnedit.data.conversations import COLUMNS, Conversation, parse_conversation
from megatron_attnedit.data.documents import DatasetOptions, read_rows
from megatron_attnedit.data.tokenizer import Tokenizer, load_tokenizer
from megatron_attnedit.errors import UserError

COMPLETION, ALL = LOSS_ON = ("completion", "all")
TRUNCATE, SKIP = OVER_LONG = ("truncate", "skip")


@dataclass(frozen=True)
class ChatConfig:
    """How conversations become samples.

    Attributes:
        loss_on: ``completion``: of a sample's tokens those count that the assistant wrote; ``all``.
        chat_template: File of a Jinja template; None: the tokenizer's own.
        template_variables: JSON object of variables that the template is given.
        seq_length: Most tokens of a conversation, the end-of-document token included; 0: any.
        over_long: Longer ones are cut there (``truncate``) or left out (``skip``); what has no
            token that counts before the cut is left out, too.

    Raises:
        UserError: names the flag whose value is none.
    """

    loss_on: str = COMPLETION
    chat_template: str | None = None
    template_variables: str = "{}"
    seq_length: int = 0
    over_long: str = TRUNCATE

    def __post_init__(self) -> None:
        for flag, value, choices in (
            ("--loss-on", self.loss_on, LOSS_ON),
            ("--over-long", self.over_long, OVER_LONG),
        ):
            if value not in choices:
                raise UserError(f"{flag} {value}: expected one of {', '.join(choices)}")
        if self.seq_length < 0:
            raise UserError(f"--seq-length {self.seq_length}: expected at least 0")
        self.variables()

    def variables(self) -> dict[str, Any]:
        """The template's variables."""
        try:
            found = json.loads(self.template_variables)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            flag = f"--chat-template-kwargs {self.template_variables[:100]}"
            raise UserError(f"{flag}: expected a JSON object")
        return found

    def template(self) -> str | None:
        """The content of ``--chat-template``."""
        if self.chat_template is None:
            return None
        try:
            return Path(self.chat_template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UserError(f"--chat-template {self.chat_template}: {reason}") from error


@dataclass(frozen=True)
class Sample:
    """A document's tokens.

    Attributes:
        ids: Token ids, the end-of-document token included; none: it is left out.
        mask: uint8, 1 where a token counts; None: all do.
        text_bytes: Of its text in UTF-8.
        notes: What is worth counting, by name.
    """

    ids: np.ndarray
    mask: np.ndarray | None = None
    text_bytes: int = 0
    notes: dict[str, int] | None = None


@functools.cache
def load_template(tokenizer: str, config: ChatConfig) -> ChatTemplate:
    """The template of a tokenizer, or that of ``--chat-template``.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    if config.chat_template:
        where = f"--chat-template {config.chat_template}"
    else:
        where = f"--tokenizer {tokenizer}"
    return ChatTemplate(load_tokenizer(tokenizer), where, config.template(), config.variables())


@functools.cache
def _backend(tokenizer: Tokenizer) -> Any:
    """The tokenizer with offsets of all its characters, white space included."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import processors

    backend = getattr(tokenizer.stock, "backend_tokenizer", None)
    if not isinstance(backend, Fast):
        raise UserError(f"--tokenizer {tokenizer.files[0].parent}: has no tokenizer.json")
    fast = Fast.from_str(backend.to_str())
    fast.no_truncation()
    fast.no_padding()
    # Adds nothing, and leaves white space to the tokens it belongs to; others' trim it off.
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    return fast


def tokens_of(tokenizer: Tokenizer, text: str, spans: Iterable[tuple[int, int]]) -> Sample:
    """Token ids of a text, and which begin in one of the spans.

    Args:
        tokenizer: Fast, so that it has offsets.
        text: A rendered conversation.
        spans: Start and end, in characters, of what counts.
    """
    encoding = _backend(tokenizer).encode(text, add_special_tokens=False)
    starts = np.array([start for start, _ in encoding.offsets], np.int64)
    mask = np.zeros(len(starts), np.uint8)
    for start, end in spans:
        mask[(starts >= start) & (starts < end)] = 1
    return Sample(np.array(encoding.ids, np.int32), mask, len(text.encode()))


def encode_conversations(
    tokenizer_path: str, config: ChatConfig, eod: int | None, conversations: list[Conversation]
) -> list[Sample | BadRow]:
    """Samples of conversations; in place of one that has none, why.

    Args:
        tokenizer_path: ``--tokenizer``.
        config: Which tokens count.
        eod: Ends every sample; None: nothing does.
        conversations: Of ``read_conversations``.
    """
    found: list[Sample | BadRow] = []
    for conversation in conversations:
        try:
            found.append(_encoded(tokenizer_path, config, eod, conversation))
        except BadRow as row:
            found.append(row)
    return found


def _encoded(
    tokenizer_path: str, config: ChatConfig, eod: int | None, conversation: Conversation
) -> Sample:
    tokenizer, template = load_tokenizer(tokenizer_path), load_template(tokenizer_path, config)
    on_completion = config.loss_on == COMPLETION
    rendered = template.render(conversation, with_spans=on_completion)
    sample = tokens_of(tokenizer, rendered.text, rendered.spans)
    ids, mask = sample.ids, sample.mask
    assert mask is not None
    end = [] if eod is None or (len(ids) and ids[-1] == eod) else [eod]
    room = config.seq_length - len(end) if config.seq_length else len(ids)
    over_long = len(ids) > room
    notes = {
        "over_long": int(over_long),
        "truncated_tokens": max(0, len(ids) - room),
        "over_long_left_out": 0,
        "thinking_left_out": rendered.left_out["thinking"],
        "tools_left_out": rendered.left_out["tools"],
    }
    # The model does not write what ends a document after the turn's own end.
    mask = np.append(mask[:room], np.zeros(len(end), np.uint8))
    if over_long and (config.over_long == SKIP or (on_completion and not mask.any())):
        notes |= {"truncated_tokens": 0, "over_long_left_out": 1}
        return Sample(np.array([], np.int32), None, 0, notes)
    ids = np.append(ids[:room], np.array(end, np.int32))
    return Sample(ids, mask if on_completion else None, sample.text_bytes, notes)


def read_conversations(
    sources: list[str],
    key: str | None,
    options: DatasetOptions,
    bad_rows: BadRows,
    *,
    with_completion: bool = True,
) -> Iterator[Conversation]:
    """The conversations of files, in order.

    Args:
        sources: Of ``expand_inputs``.
        key: Key of the messages; None: the usual ones.
        options: How ``hf:NAME`` is read.
        bad_rows: What is done with rows that are no conversation.
        with_completion: An assistant must have answered.

    Raises:
        UserError: see ``read_rows``; and a row that is none, if those stop.
    """
    columns = (key, "tools", "system") if key else COLUMNS
    parse = functools.partial(parse_conversation, with_completion=with_completion)
    for source in sources:
        rows = read_rows(source, columns, options, bad_rows)
        parsed = ((where, functools.partial(parse, where, row, key)) for where, row in rows)
        yield from (conversation for _, conversation in bad_rows.kept(parsed))


def describe_chat(tokenizer: str, config: ChatConfig) -> dict[str, Any]:
    """What the description of the tokens says of how they were made."""
    source = load_template(tokenizer, config).source()
    fields = asdict(config)
    fields.pop("chat_template")
    return {"chat": {**fields, "template_sha256": sha256(source.encode()).hexdigest()}}
