"""Pairs of answers: records with a prompt, the answer that was chosen and the one that was rejected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale.config.data import SourceConfig
from kdscale.config.distill.on_policy import PairSourceConfig, PreferencesConfig
from kdscale.data.readers import jsonl
from kdscale.data.readers.chat import parse_messages
from kdscale.data.readers.records import checked_text
from kdscale.errors import DataError
from kdscale.files import sha256_file
from kdscale.responses.prompts import file_of_kind

SECTION = "distill.preferences.pairs"
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Pair:
    """A prompt as messages of {"role", "content"}, and two answers; `where` it is, for messages to people."""

    messages: list[dict[str, str]]
    chosen: str
    rejected: str
    where: str


class Pairs:
    """All pairs of a config, in the order of its files; read from the disk each time."""

    def __init__(self, settings: PreferencesConfig):
        self._settings = settings

    def __iter__(self) -> Iterator[Pair]:
        """Raises DataError, with file and line, for what is no pair, and for a file without any."""
        for source in self._settings.pairs:
            count = 0
            for where, record in jsonl.read(str(_file(source)), SourceConfig(path=source.path)):
                count += 1
                yield _pair(record, self._settings.system, where)
            if not count:
                raise DataError(f"{source.path} holds no pair", expected="a record on each line")

    def digests(self) -> dict[str, str]:
        """sha256 of each file, by its path in the config. Raises DataError for one that is missing."""
        return {source.path: sha256_file(_file(source)) for source in self._settings.pairs}


def _pair(record: Any, system: str | None, where: str) -> Pair:
    answers = {name: _answer(record.get(name), f"{where}, field {name!r}") for name in ("chosen", "rejected")}
    (chosen, before), (rejected, others) = answers["chosen"], answers["rejected"]
    if "prompt" not in record and before != others:
        raise DataError(
            f"{where}: chosen and rejected", expected="one prompt: `prompt`, or the same messages before both answers",
            got="chats that differ before the last answer", hint="give the record a field `prompt`",
        )  # fmt: skip
    prompt = record.get("prompt")
    messages = before if prompt is None else _prompt(prompt, f"{where}, field 'prompt'")
    if not messages:
        raise DataError(f"{where}, field 'prompt'", expected="a text, or a list of messages", got="nothing")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Pair(messages, chosen, rejected, where)


def _answer(value: Any, what: str) -> tuple[str, list[dict[str, str]]]:
    """The text of an answer, and of a chat the messages before it."""
    if isinstance(value, list):
        messages = parse_messages(value, what).messages
        if messages and messages[-1]["role"] == "assistant" and messages[-1]["content"].strip():
            return messages[-1]["content"], messages[:-1]
    elif isinstance(value, str) and value.strip():
        return checked_text(value, what), []
    raise DataError(
        what, expected="an answer as a text, or a chat that ends with one of the assistant's",
        got="nothing" if value is None else repr(value)[:100], hint="delete the line, or give both answers",
    )  # fmt: skip


def _prompt(value: Any, what: str) -> list[dict[str, str]]:
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": checked_text(value, what)}]
    messages = parse_messages(value, what).messages if isinstance(value, list) else []
    if not messages or messages[-1]["role"] != "user":
        raise DataError(
            what, expected="a text, or messages of which the last is a user's", got=repr(value)[:100],
            hint="delete the line, or correct it",
        )  # fmt: skip
    return messages


def _file(source: PairSourceConfig) -> Path:
    """The file of a source. Raises DataError for one that is missing or of another kind."""
    path = Path(source.path).expanduser()
    return file_of_kind(path, f"{SECTION}: {source.path}", _SUFFIXES, " or ".join(_SUFFIXES))
