"""Conversations as text, with the spans that the assistant wrote: what a student learns of them.

The text is what the chat template of the tokenizer makes of the messages. Where an answer lies in it is found by
rendering the conversation once more with a mark in the answer's place, which works for any template. What ends an
answer (the special token that follows it) belongs to it: the student has to learn when to stop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kdscale.config.data import DataConfig
from kdscale.data.readers.records import checked_text
from kdscale.errors import ConfigError, DataError
from kdscale.files import read_text

ROLES = ("system", "user", "assistant", "tool")
_ROLE_OF = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}  # ShareGPT's names too
_MARK = "\ue0a7\ue0a5\ue0a7"  # of the private use area: in no text, and never trimmed
_MAX_TEMPLATE_BYTES = 1 << 20


def chat_template(data: DataConfig, tokenizer: Any) -> ChatTemplate:
    """The template that the config names, else the tokenizer's own.

    Raises FileError for a file that cannot be read, and ConfigError where a chat is to be read without any template.
    """
    path = data.chat_template
    template = None if path is None else read_text(Path(path).expanduser(), limit=_MAX_TEMPLATE_BYTES)
    if data.has_chats and template is None and not tokenizer.chat_template:
        raise ConfigError(
            "data.chat_template",
            expected="a Jinja file, as sources are chats and the teacher's tokenizer has no chat template",
            hint="name e.g. the chat_template.jinja of its instruct model",
        )
    return ChatTemplate(tokenizer, template)


class Messages(NamedTuple):
    """Messages of {"role", "content"}; `had_tools`: whether there were calls of tools, which are left out."""

    messages: list[dict[str, str]]
    had_tools: bool


def parse_messages(messages: Any, where: str) -> Messages:
    """The messages of a conversation, without calls of tools and what they returned.

    Roles may have ShareGPT's names, and a content may be given in parts. Raises DataError for what is no list of
    messages, for an unknown role, and for a content that is no text.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(where, expected="a list of messages, each with role and content", got=_kind(messages))
    parsed, had_tools = [], False
    for number, message in enumerate(messages, 1):
        what = f"{where}, message {number}"
        name = message.get("role", message.get("from"))
        role = _ROLE_OF.get(name) if isinstance(name, str) else None
        if role is None:
            raise DataError(f"{what}: role", expected=f"one of {', '.join(ROLES)}", got=repr(name)[:100])
        content = message.get("content", message.get("value"))
        had_tools |= role == "tool" or bool(message.get("tool_calls"))
        if role != "tool" and not (content is None and message.get("tool_calls")):
            parsed.append({"role": role, "content": checked_text(_joined(content), f"{what}: content")})
    return Messages(parsed, had_tools)


@dataclass(frozen=True)
class Chat:
    """A conversation as text; `answers`: the spans of characters that the assistant wrote, ascending."""

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass
class ChatTemplate:
    """Renders conversations with a tokenizer's chat template, or with `template` in its place.

    `left_out_tools`: whether a conversation had calls of tools, which are left out with what they returned.
    """

    tokenizer: Any
    template: str | None = None
    left_out_tools: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        tokens = {str(token) for token in self.tokenizer.added_tokens_decoder.values()} - {""}
        ends = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
        self._end = re.compile(rf"\s*(?:{ends})" if ends else "(?!)")

    @property
    def text(self) -> str | None:
        """The template itself; None where there is none."""
        return self.template or self.tokenizer.chat_template

    def chat(self, messages: Any, where: str) -> Chat:
        """A conversation as text.

        Raises DataError for what is no list of messages, for an unknown role, a conversation without an answer, and
        one that the template refuses.
        """
        parsed, had_tools = parse_messages(messages, where)
        self.left_out_tools |= had_tools
        answers = [i for i, message in enumerate(parsed) if message["role"] == "assistant"]
        if not answers:
            raise DataError(
                f"{where} has no answer to learn from",
                expected="a message of the role assistant",
                got=f"roles {[message['role'] for message in parsed]}"[:200],
                hint="leave conversations without answers out",
            )
        text = self._render(parsed, where)
        return Chat(text, tuple(self._span(parsed, i, text, where) for i in answers))

    def prompt(self, messages: Any, where: str) -> str:
        """A conversation as the text that its next answer goes on from. Raises DataError, as `chat` does."""
        return self._render(parse_messages(messages, where).messages, where, prompt=True)

    def _span(self, messages: Sequence[dict[str, str]], number: int, text: str, where: str) -> tuple[int, int]:
        """Where in `text` the answer `number` lies, with the special token that ends it."""
        marked = [*messages[:number], {**messages[number], "content": _MARK}, *messages[number + 1 :]]
        head, mark, tail = self._render(marked, where).partition(_MARK)
        if not text.startswith(head):  # a template that writes an answer's thoughts apart from the rest of it
            head = self._render(messages[:number], where, prompt=True)
        end = len(text) - len(tail)
        if not mark or not text.startswith(head) or not text.endswith(tail) or end < len(head):
            raise DataError(
                f"{where}, message {number + 1}: the chat template does not say where this answer is",
                expected="a template that writes each message in one piece",
                hint="name another template in data.chat_template",
            )
        ending = self._end.match(text, end)
        return len(head), ending.end() if ending else end

    def _render(self, messages: Sequence[dict[str, str]], where: str, prompt: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a program, which may raise anything
            text = " ".join(str(error).split())[:300]
            raise DataError(
                f"{where}: the chat template refuses this conversation",
                got=f"{type(error).__name__}: {text}",
                hint="correct the order of the roles, or name another template in data.chat_template",
            ) from error
        return checked_text(rendered, f"{where}: what the chat template made of it")


def _joined(content: Any) -> Any:
    """The text of a content that is given in parts, each {"type": "text", "text": ...}; anything else as it is."""
    if isinstance(content, list) and all(isinstance(part, dict) and set(part) >= {"type", "text"} for part in content):
        texts = [part["text"] for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return type(value).__name__
    return "a list with " + ", ".join(sorted({type(item).__name__ for item in value}))
