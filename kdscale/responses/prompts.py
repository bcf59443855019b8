"""Prompts: lines of text, or records with a prompt or a chat, each of which becomes a list of messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from kdscale.config.data import PromptSourceConfig, SourceConfig
from kdscale.data.readers import jsonl
from kdscale.data.readers.chat import parse_messages
from kdscale.data.readers.records import checked_text
from kdscale.data.readers.text import numbered_lines
from kdscale.errors import DataError
from kdscale.files import sha256_file

BUILTIN = "builtin:questions"  # a few dozen that come with the package, to try this out
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Prompt:
    """Messages of {"role", "content"}, the last one a user's; `where` it is, for messages to people."""

    messages: list[dict[str, str]]
    where: str


class PromptSettings(Protocol):
    """Where prompts are, and the system message of chats that have none."""

    @property
    def prompts(self) -> tuple[PromptSourceConfig, ...]: ...
    @property
    def system(self) -> str | None: ...


class Prompts:
    """All prompts of a config, in the order of its files; read from the disk each time, and never held together."""

    def __init__(self, settings: PromptSettings, section: str = "responses.prompts"):
        """`section` of the config has the sources: messages name it."""
        self._settings, self._section = settings, section

    def __iter__(self) -> Iterator[Prompt]:
        """Raises DataError, with file and line, for what is no prompt, and for a file without any."""
        for source in self._settings.prompts:
            count = 0
            for where, value in _values(source, self._section):
                count += 1
                yield Prompt(self._messages(value, source.field, where), where)
            if not count:
                raise DataError(f"{source.path} holds no prompt", expected="a prompt on each line")

    def digests(self) -> dict[str, str]:
        """sha256 of each file, by its path in the config. Raises DataError for one that is missing."""
        return {source.path: sha256_file(_file(source, self._section)) for source in self._settings.prompts}

    def _messages(self, value: str | dict[str, Any], field: str, where: str) -> list[dict[str, str]]:
        """The chat of a line or record: without its last answer, and with the system message of the config."""
        if isinstance(value, dict) and "messages" in value:
            messages = _to_be_answered(value["messages"], where)
        else:
            messages = [{"role": "user", "content": _text(value, field, where, self._section)}]
        if self._settings.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._settings.system}, *messages]
        return messages


def _values(source: PromptSourceConfig, section: str) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Where each prompt is, and the line or record."""
    path = _file(source, section)
    if path.name.endswith(".txt"):
        with path.open("rb") as stream:
            for number, line in numbered_lines(stream, path):
                yield f"{path} line {number}", line.strip()
    else:
        yield from jsonl.read(str(path), SourceConfig(path=source.path))


def _text(value: str | dict[str, Any], field: str, where: str, section: str) -> str:
    """The prompt of a line or record. Raises DataError for a record without one."""
    if isinstance(value, str):
        return value
    text, what = value.get(field), f"{where}, field {field!r}"
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            what, expected="a prompt, or `messages`",
            got=f"fields {sorted(value)}" if text is None else repr(text)[:100],
            hint=f"set `field` of this source in {section}",
        )  # fmt: skip
    return checked_text(text, what)


def _to_be_answered(chat: Any, where: str) -> list[dict[str, str]]:
    """The messages up to the last of a user. Raises DataError for a chat that cannot be answered."""
    messages = parse_messages(chat, where).messages
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(
            f"{where}: messages", expected="a user's message at the end, or before the last answer",
            got=f"roles {[message['role'] for message in messages]}"[:200] if messages else "none",
            hint="delete the line, or end the chat with a user's message that has a text",
        )  # fmt: skip
    return messages


def _file(source: PromptSourceConfig, section: str) -> Path:
    """The file of a source. Raises DataError for one that is missing or of another kind."""
    if source.path == BUILTIN:
        path = Path(str(resources.files("kdscale.responses") / "questions.txt"))
    else:
        path = Path(source.path).expanduser()
    return file_of_kind(path, f"{section}: {source.path}", _SUFFIXES, f"{', '.join(_SUFFIXES)}, or {BUILTIN}")


def file_of_kind(path: Path, what: str, suffixes: tuple[str, ...], expected: str) -> Path:
    """`path`. Raises DataError, naming `what`, for one that is missing or has none of the suffixes (`expected`)."""
    if not path.is_file() or not path.name.endswith(suffixes):
        raise DataError(
            what, expected=f"a file that ends in {expected}",
            got="a file of another kind" if path.is_file() else "no such file", hint="check the path",
        )  # fmt: skip
    return path
