"""Prompts from lines, records and chats; what is none is named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.responses.settings import ResponsesConfig
from kdscale.errors import DataError
from kdscale.responses.prompts import Prompts


def prompts(path: Path, **settings: Any) -> list[list[dict[str, str]]]:
    config = ResponsesConfig.model_validate(
        {"prompts": [{"path": str(path), **settings.pop("source", {})}], **settings}
    )
    return [prompt.messages for prompt in Prompts(config)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_each_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfWhat is a mill?\r\n\n  Why do rivers bend?  \n")
    assert prompts(file) == [[user("What is a mill?")], [user("Why do rivers bend?")]]
    assert prompts(file, system="Be brief.")[0][0] == {"role": "system", "content": "Be brief."}


def test_records_hold_prompts_or_chats_whose_last_answer_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl.gz"
    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "old", "extra": 1}
    records = [{"question": "a"}, {"messages": [system, user("b"), answer, user("c"), answer]}]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    plain = {"role": "assistant", "content": "old"}
    expected = [[user("a")], [system, user("b"), plain, user("c")]]
    assert prompts(file, source={"field": "question"}) == expected
    assert prompts(file, source={"field": "question"}, system="other")[1] == expected[1]


def test_chats_are_read_as_those_of_the_data_are(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    called = [{"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "42"}]
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    records = [
        {"messages": [parts, *called, {"from": "gpt", "value": "old"}]},
        {"messages": [{"from": "human", "value": "c"}]},
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    assert prompts(file) == [[user("ab")], [user("c")]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "field 'prompt'"),
        ('{"prompt": 3}', "got:      3"),
        ('{"prompt": " "}', "a prompt"),
        ('{"messages": []}', "a user's message"),
        ('{"messages": "x"}', "a list of messages"),
        ('{"messages": [{"role": "boss", "content": "x"}]}', "role(.|\n)*one of"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content(.|\n)*a string"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "a user's message"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "a user's message"),
        ('{"prompt": "\\ud800"}', "Unicode"),
        ("nonsense", "not valid JSON"),
    ],
)
def test_what_is_no_prompt_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"(?s)line 2.*{message}"):
        prompts(file)


def test_files_that_are_not_there_or_hold_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"fine\n\xe9\n")
    for name, message in (
        ("none.txt", "no such file"),
        ("empty.txt", "no prompt"),
        ("latin.txt", "line 2 is not UTF-8"),
    ):
        with pytest.raises(DataError, match=message):
            prompts(tmp_path / name)
    (tmp_path / "p.csv").write_text("a")
    with pytest.raises(DataError, match="another kind"):
        prompts(tmp_path / "p.csv")
