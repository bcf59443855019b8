"""From the journal to what the student learns from: filters, and chat lines of the answers that are left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TextIO

from kdscale.errors import DataError
from kdscale.files import atomic_path, write_json
from kdscale.responses.chat import answers_of
from kdscale.responses.filters import Filter, Group
from kdscale.responses.journal import Journal
from kdscale.responses.prompts import Prompt
from kdscale_launch.watchdog import beat

SUMMARY_FILE = "summary.json"
LABEL = "responses"  # where the text of these lines comes from, as a source of data
_AT_ONCE = 1024  # prompts that the filters get together


@dataclass
class Summary:
    """How many prompts and answers there were, and what became of them."""

    prompts: int = 0
    repeated: int = 0  # prompts that came before
    refused: int = 0  # prompts that the endpoint refused
    answers: int = 0
    empty: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by filter, in the order of the config

    def facts(self) -> dict[str, str | int]:
        """For the stage's manifest, which `kdscale status` and report.json show."""
        facts: dict[str, str | int] = {"prompts": self.prompts, "answers": self.answers, "kept": self.kept}
        for name, count in (
            ("repeated prompts", self.repeated),
            ("refused prompts", self.refused),
            ("empty answers", self.empty),
            *((f"dropped by {name}", count) for name, count in self.dropped.items()),
        ):
            facts |= {name: count} if count or name.startswith("dropped") else {}
        return facts


def write_kept(
    prompts: Iterable[Prompt], key: Callable[[Prompt], str], journal: Journal, filters: Sequence[tuple[str, Filter]],
    file: Path,
) -> Summary:  # fmt: skip
    """Write the chat lines to `file` and `summary.json` beside it; returns the summary.

    A line has `messages` (the prompt and the answer), `source` and `finish_reason`, and `logprobs` where the endpoint
    gave them. Raises DataError when nothing is left.
    """
    summary = Summary(dropped=Counter(dict.fromkeys((name for name, _ in filters), 0)))
    groups = _groups(prompts, key, journal, summary)
    with atomic_path(file) as tmp, tmp.open("w", encoding="utf-8") as stream:
        while some := list(islice(groups, _AT_ONCE)):
            for _, drop_some in filters:
                drop_some(some)
                beat()
            _write(some, stream, summary)
        if not summary.kept:
            raise DataError(
                "responses: no answer is left for the student", expected="some that the filters keep",
                got=", ".join(f"{name}: {value}" for name, value in summary.facts().items()),
                hint="loosen responses.filters; the answers are kept, and none is asked for again",
            )  # fmt: skip
    write_json(file.with_name(SUMMARY_FILE), summary.facts())
    return summary


def _groups(
    prompts: Iterable[Prompt], key: Callable[[Prompt], str], journal: Journal, summary: Summary
) -> Iterator[Group]:
    """The answers to each prompt, once."""
    seen = set()
    for prompt in prompts:
        summary.prompts += 1
        name = key(prompt)
        if name in seen:
            summary.repeated += 1
            continue
        seen.add(name)
        record = journal.get(name)
        answers = answers_of(record)
        summary.refused += "refused" in record
        summary.answers += len(answers)
        summary.empty += sum(not answer.text.strip() for answer in answers)
        yield Group(prompt, [answer for answer in answers if answer.text.strip()])


def _write(groups: Sequence[Group], stream: TextIO, summary: Summary) -> None:
    for group in groups:
        for answer in group.answers:
            if answer.dropped_by:
                summary.dropped[answer.dropped_by] += 1
                continue
            line = {
                "messages": [*group.prompt.messages, {"role": "assistant", "content": answer.text}],
                "source": LABEL,
                "finish_reason": answer.finish_reason,
                **({"logprobs": answer.logprobs} if answer.logprobs else {}),
            }
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            summary.kept += 1
