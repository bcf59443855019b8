"""What the student goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdscale.config.data import PromptSourceConfig
from kdscale.config.distill.on_policy import OnPolicyConfig
from kdscale.data.packing import PackedSequence
from kdscale.distill.on_policy.prompts import FilePrompts, Prompt, TextPrompts, read_prompts
from kdscale.errors import DataError

EOS = 99


def split(documents: list[list[int]], answers: list[list[int]] | None = None, prefix: tuple[int, ...] = ()) -> Any:
    """A stand-in for a TokenSplit; `answers`: the places of each document's labels."""
    is_label = (
        None if answers is None else [np.isin(np.arange(len(d)), a) for d, a in zip(documents, answers, strict=True)]
    )
    return SimpleNamespace(
        documents=len(documents), eos_id=EOS, prefix_ids=prefix, tags_D=np.arange(len(documents)),
        document_tokens=lambda i: np.asarray(documents[i]),
        document_is_label=lambda i: is_label[i][: len(documents[i])] if is_label else None,
    )  # fmt: skip


def packed(pieces: list[list[int]]) -> PackedSequence:
    ids = np.concatenate([np.asarray(piece) for piece in pieces])
    positions = np.concatenate([np.arange(len(piece)) for piece in pieces])
    tags = np.concatenate([np.full(len(piece), number) for number, piece in enumerate(pieces)])
    return PackedSequence(ids, positions, ids, tags, list(range(len(pieces))))


def test_pieces_begin_at_equal_distances_and_keep_to_one_document() -> None:
    long, short = list(range(30)), [*range(40, 49), EOS]
    book = TextPrompts(split([long, short]), split([long]), lambda number: packed([long, short]), most=10, slots=4)
    assert book.of(0, 0) == Prompt(long[:10], 0)
    assert book.of(0, 1) == Prompt(long[10:20], 0)
    assert book.of(0, 2) == Prompt(long[20:30], 0)
    assert book.of(0, 3) == Prompt(short[:-1], 1)  # never what follows an end of text


def test_a_piece_at_the_end_of_its_document_begins_where_that_does() -> None:
    first, second = list(range(14)), list(range(20, 26))
    book = TextPrompts(split([first, second]), split([first]), lambda number: packed([first, second]), most=8, slots=2)
    assert book.of(0, 1) == Prompt(first[:8], 0)  # four tokens were left from 10 on


def test_what_begins_a_text_begins_a_piece_too() -> None:
    text = [1, *range(30, 49)]
    book = TextPrompts(split([text], prefix=(1,)), split([text[1:]], prefix=(1,)), lambda number: packed([text]), 9, 2)
    assert book.of(0, 0).ids == text[:9]
    assert book.of(0, 1).ids == [1, *text[10:18]]
    assert book.held_out(3) == [Prompt(text[:9], 0)]


def test_of_a_chat_it_is_what_comes_before_an_answer() -> None:
    chat = list(range(20))
    chats = split([chat], [[4, 5, 6, 7, 12, 13, 14]])
    book = TextPrompts(chats, chats, lambda number: packed([chat]), most=10, slots=1)
    assert book.of(0, 0).ids == chat[:4]
    book = TextPrompts(chats, chats, lambda number: packed([chat]), most=12, slots=1)
    assert book.of(0, 0).ids == chat[:12] == book.held_out(1)[0].ids
    book = TextPrompts(chats, chats, lambda number: packed([chat]), most=3, slots=1)  # no question is that short
    assert book.of(0, 0).ids == chat[:3]


def test_prompts_of_files_come_in_another_order_each_time_round_and_some_are_held_out() -> None:
    prompts = [[number] for number in range(40)]
    book = FilePrompts(prompts, slots=2, seed=3)
    assert book.held_out(9) == [Prompt([0]), Prompt([20])]
    turns = [
        [book.of(number, slot).ids[0] for number in range(start, start + 19) for slot in (0, 1)] for start in (0, 19)
    ]
    assert sorted(turns[0]) == sorted(turns[1]) == [n for n in range(40) if n % 20]
    assert turns[0] != turns[1]
    few = FilePrompts([[7]], slots=1, seed=0)
    assert few.of(5, 0) == few.held_out(1)[0] == Prompt([7])


class Tokenizer:
    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


def test_files_are_read_by_the_template_or_as_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "abc"}) + "\n")
    settings = OnPolicyConfig(prompts=(PromptSourceConfig(path=str(file)),), prompt_tokens=6)
    template: Any = SimpleNamespace(text=None)
    assert read_prompts(settings, Tokenizer(), template, [1]) == [[1, 97, 98, 99]]
    template = SimpleNamespace(text="x", prompt=lambda messages, where: f"<{messages[0]['content']}>")
    assert read_prompts(settings, Tokenizer(), template, [1]) == [[ord(c) for c in "<abc>"]]
    short = settings.model_copy(update={"prompt_tokens": 2})
    with pytest.raises(DataError, match=r"line 1: a prompt of 5 tokens\n  expected: 1 to 2"):
        read_prompts(short, Tokenizer(), template, [])
    file.write_text(json.dumps({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}))
    with pytest.raises(DataError, match="no chat template"):
        read_prompts(settings, Tokenizer(), SimpleNamespace(text=None), [])  # type: ignore[arg-type]
