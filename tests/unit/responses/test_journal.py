"""The journal: a record counts when it is on the disk, half a line counts as none, and nothing is lost or changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.errors import RunFolderError
from kdscale.responses.journal import Journal, Usage, key_of


def fill(folder: Path, texts: list[str], writer: str = "answers") -> Journal:
    journal = Journal(folder, writer)
    for number, text in enumerate(texts):
        journal.append(key_of(writer, number), text=text, prompt_tokens=1, answer_tokens=len(text))
    return journal


@settings(max_examples=40)  # each flushes to the disk
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5), st.integers(0, 400))
def test_a_kill_at_any_byte_loses_the_last_record_at_most(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    fill(folder, texts).close()
    file = folder / "answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    journal = Journal(folder, "answers")
    assert len(journal) == lines
    for number in range(len(texts)):
        assert (key_of("answers", number) in journal) == (number < lines)
        if number >= lines:
            journal.append(key_of("answers", number), text=texts[number], prompt_tokens=1, answer_tokens=0)
        assert journal.get(key_of("answers", number))["text"] == texts[number]
    journal.close()
    assert len(Journal(folder)) == len(texts)


def test_writers_see_what_others_left_and_write_files_of_their_own(tmp_path: Path) -> None:
    fill(tmp_path, ["one", "two"], "answers-1").close()
    with (tmp_path / "answers-1.jsonl").open("ab") as stream:
        stream.write(b'{"half')  # another process may still be writing it
    journal = fill(tmp_path, ["three"], "answers-0")
    assert journal.get(key_of("answers-1", 1))["text"] == "two"
    assert journal.usage == Usage(3, 11)
    assert (tmp_path / "answers-1.jsonl").read_bytes().endswith(b'{"half')


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'{"key": "zz"}', b'{"key": "00"}', b'{"text": "x"}', b"null"])
def test_a_damaged_line_costs_itself_alone(tmp_path: Path, line: bytes) -> None:
    fill(tmp_path, ["one", "two"]).close()
    file = tmp_path / "answers.jsonl"
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + line + b"\n" + second)
    said: list[str] = []
    journal = Journal(tmp_path, "answers", say=said.append)
    assert journal.get(key_of("answers", 1))["text"] == "two"
    assert len(said) == 1 and "line 2 is damaged" in said[0]
    assert line in file.read_bytes()  # what was paid for is not deleted


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    folder = tmp_path / "journal"
    folder.mkdir()
    (folder / "answers.jsonl").symlink_to(outside)
    for writer in ("answers", "others", None):
        with pytest.raises(RunFolderError):
            Journal(folder, writer)
    assert outside.read_text() == "mine\n"


def test_a_key_depends_on_every_part_and_on_no_order_of_fields() -> None:
    assert key_of("chat", {"a": 1, "b": 2}) == key_of("chat", {"b": 2, "a": 1})
    assert len({key_of("chat", {"a": 1}), key_of("chat", {"a": 2}), key_of("local", {"a": 1})}) == 3
