"""Conversations to text by a tokenizer's chat template, and where in it the assistant speaks.

A template with generation markers has the places itself. Of another one they are found by
rendering prefixes of the conversation: a turn begins where the messages before it end, rendered
with the generation prompt, and ends where the messages up to it end, less the white space behind
the token that ends the turn. Both prefixes must be found in the whole. They are its beginning, or,
where a template writes earlier turns in another way than the last (Qwen3 drops their thinking),
what the template writes behind the last content of the prefix is what stands behind it in the
whole; rendering with another content in its place shows where that is.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.data.conversations import Conversation, Message
from megatron_attnedit.data.tokenizer import Tokenizer
from megatron_attnedit.errors import UserError, one_line

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
OTHER_CONTENT = "\ue000"  # of private use: no text ends with it
INLINE_THINKING = re.compile(r"<think>(.*?)</think>", re.DOTALL)
Spans = list[tuple[int, int]]  # first character, and the one behind the last


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: What the template makes of it.
        spans: What the assistant wrote of that, in order.
        left_out: What the template does not show, by kind.
    """

    text: str
    spans: Spans
    left_out: dict[str, int]


class ChatTemplate:
    """A chat template and the variables it is rendered with.

    Args:
        tokenizer: Of a Hugging Face directory.
        where: Flag and value, for messages.
        template: Its text; None: the tokenizer's own.
        variables: Given to the template, such as ``enable_thinking`` or a date.

    Raises:
        UserError: there is none, or it is no Jinja template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        where: str,
        template: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> None:
        self._stock, self._where = tokenizer.stock, where
        if self._stock is None or (template is None and not self._stock.chat_template):
            raise UserError(
                f"{where}: the tokenizer has no chat template; --chat-template names a file"
            )
        self._given, self._variables = template, variables or {}
        self._check()

    def _check(self) -> None:
        from jinja2.exceptions import TemplateError

        try:
            self._render([{"role": "user", "content": "x"}], True, None)
        except TemplateError as error:
            if type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError"):
                raise UserError(f"{self._where}: its chat template: {one_line(error)}") from error
        except Exception:  # whatever else it has against these messages, rows will show
            pass

    def source(self, conversation: Conversation | None = None) -> str:
        """The template's text; of several, that for a conversation with or without tools."""
        tools = conversation.tools if conversation else None
        found: str = self._stock.get_chat_template(self._given, tools)
        return found

    def _render(self, messages: list[Message], prompt: bool, tools: Any) -> str:
        text: str = self._stock.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._given,
            add_generation_prompt=prompt,
            tokenize=False,
            **self._variables,
        )
        return text

    def render(self, conversation: Conversation, *, with_spans: bool = True) -> Rendered:
        """Text and, if asked, the assistant's part of it.

        Raises:
            BadRow: the template refuses the conversation, leaves out what the assistant wrote, or
                does not render prefixes consistently.
        """
        try:
            return self._rendered(conversation, with_spans)
        except BadRow:
            raise
        except Exception as error:  # templates raise what they like
            reason = f"the chat template refuses it: {one_line(error)}"
            raise BadRow(f"{conversation.where}: {reason}", "refused by the template") from error

    def _rendered(self, conversation: Conversation, with_spans: bool) -> Rendered:
        messages, tools = conversation.messages, conversation.tools
        text = self._render(messages, False, tools)
        spans: Spans = []
        if with_spans and MARKERS.search(self.source(conversation)):
            text, spans = self._marked(conversation)
        elif with_spans:
            spans = [
                self._span(conversation, text, i)
                for i, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        if with_spans and not any(text[start:end].strip() for start, end in spans):
            raise BadRow(f"{conversation.where}: the template marks no completion", "no completion")
        return Rendered(text, spans, self._left_out(conversation, text, spans))

    def _left_out(self, conversation: Conversation, text: str, spans: Spans) -> dict[str, int]:
        """What the template does not show.

        Raises:
            BadRow: a tool call, without which an answer is no answer.
        """
        messages, tools = conversation.messages, conversation.tools
        written = "".join(text[start:end] for start, end in spans) or text
        no_tools = bool(tools) and text == self._render(messages, False, None)
        found = {"thinking": 0, "tools": int(no_tools)}
        for number, message in enumerate(messages, start=1):
            if message["role"] != "assistant":
                continue
            inline = INLINE_THINKING.search(message["content"])
            thinking: str = message.get("reasoning_content") or (inline[1] if inline else "")
            found["thinking"] += thinking.strip() not in written
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in written:
                    reason = f"message {number}: the template leaves out the tool call"
                    raise BadRow(f"{conversation.where}: {reason}", "tool call left out")
        return found

    def _marked(self, conversation: Conversation) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            [conversation.messages],
            tools=conversation.tools,
            chat_template=self.source(conversation),
            return_assistant_tokens_mask=True,
            **{**self._stock.special_tokens_map, **self._variables},
        )
        return texts[0], [tuple(span) for span in spans[0]]

    def _span(self, conversation: Conversation, text: str, index: int) -> tuple[int, int]:
        """Where an assistant's turn stands in the text.

        Raises:
            BadRow: the template does not render prefixes consistently, or shows no content.
        """
        start = self._end_of_prefix(conversation, text, index - 1, prompt=True)
        end = self._end_of_prefix(conversation, text, index, prompt=False)
        message = conversation.messages[index]
        shown = message["content"].strip()[-20:] in text[start:end] or "tool_calls" in message
        if not 0 <= start < end or not shown:
            raise BadRow(
                f"{conversation.where}: message {index + 1}: the chat template does not render "
                "prefixes consistently, so what the assistant wrote is not known; --chat-template "
                "with generation markers, or --loss-on all",
                "inconsistent prefixes",
            )
        return start, end

    def _end_of_prefix(
        self, conversation: Conversation, text: str, index: int, *, prompt: bool
    ) -> int:
        """Where, in the whole text, the messages up to ``index`` end; -1 if that is not known.

        Args:
            conversation: The whole.
            text: The whole, rendered.
            index: Last message of the prefix.
            prompt: Its end is that of the generation prompt; else white space at its end is
                another turn's.
        """
        messages, tools = conversation.messages, conversation.tools
        prefix = self._render(messages[: index + 1], prompt, tools)
        prefix = prefix if prompt else prefix.rstrip()
        if text.startswith(prefix):
            return len(prefix)
        other: Message = {**messages[index], "content": OTHER_CONTENT}
        changed = [*messages[:index], other]
        behind = _common_end(text, self._render([*changed, *messages[index + 1 :]], False, tools))
        changed_prefix = self._render(changed, prompt, tools)
        closing = _common_end(prefix, changed_prefix if prompt else changed_prefix.rstrip())
        return len(text) - len(behind) + len(closing) if behind.startswith(closing) else -1


def _common_end(a: str, b: str) -> str:
    """The longest text that both end with."""
    common = os.path.commonprefix([a[::-1], b[::-1]])
    return common[::-1]
