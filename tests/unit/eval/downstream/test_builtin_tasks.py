"""The tasks that kdscale brings along: well-formed, without duplicates, and without a leak of the right choice."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kdscale.data import sources
from kdscale.eval.downstream import local_tasks
from kdscale.eval.downstream.local_tasks import builtin_names, read_task, task_files

_FOLDER = Path(local_tasks.__file__).parent / "builtin"
_CHOICES = {"arithmetic": 4, "cloze": 4, "common_sense": 2, "minimal_pairs": 2}
_RUN = 8  # so many words in a row are no coincidence


def items_of(task: str) -> list[dict[str, Any]]:
    (file,) = task_files(f"builtin:{task}")
    return read_task(file).items["test"]


def whole(item: dict[str, Any], choice: str) -> str:
    return f"{item['context']} {choice}".strip()


def test_these_are_all_of_them() -> None:
    assert builtin_names() == sorted(_CHOICES)
    assert "618 items" in (_FOLDER / "README.md").read_text()
    assert sum(len(items_of(task)) for task in _CHOICES) == 618


@pytest.mark.parametrize("task", _CHOICES)
def test_every_item_is_well_formed_and_there_once(task: str) -> None:
    items = items_of(task)
    assert 120 <= len(items) <= 200
    for item in items:
        assert list(item) == ["id", "kind", "context", "choices", "answer"], item
        assert len(set(item["choices"])) == len(item["choices"]) == _CHOICES[task], item
        assert 0 <= item["answer"] < _CHOICES[task], item
        assert item["id"].startswith(f"{item['kind']}-"), item
        for text in (item["context"], *item["choices"]):
            assert text == " ".join(text.split()), item
            assert text.isascii(), item
        assert (item["context"] == "") == (task == "minimal_pairs"), item
        if task in ("minimal_pairs", "common_sense"):
            assert all(choice[-1] in '.?!"' for choice in item["choices"]), item
    assert len({item["id"] for item in items}) == len(items)
    texts = Counter(whole(item, item["choices"][item["answer"]]).lower() for item in items)
    assert max(texts.values()) == 1
    if task != "minimal_pairs":
        assert len({item["context"] for item in items}) == len(items)


@pytest.mark.parametrize("task", _CHOICES)
def test_neither_position_nor_length_tells_the_right_choice(task: str) -> None:
    items, chance = items_of(task), 1 / _CHOICES[task]
    for kind in {item["kind"] for item in items}:
        right = Counter(item["answer"] for item in items if item["kind"] == kind)
        counts = [right[place] for place in range(_CHOICES[task])]
        assert max(counts) - min(counts) <= 1, kind
    for extreme in (min, max):
        shares = []
        for item in items:
            lengths = [len(choice) for choice in item["choices"]]
            picked = [length == extreme(lengths) for length in lengths]
            shares.append(picked[item["answer"]] / sum(picked))
        assert abs(sum(shares) / len(shares) - chance) < 0.05, extreme


def test_sums_are_right_and_the_size_of_a_number_tells_nothing() -> None:
    sums = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    ranks: Counter[int] = Counter()
    checked = 0
    items = items_of("arithmetic")
    for item in items:
        numbers = [int(choice) for choice in item["choices"]]
        right = numbers[item["answer"]]
        ranks[sorted(numbers).index(right)] += 1
        if sum_ := re.fullmatch(r"(\d+) (plus|minus|times) (\d+) is", item["context"]):
            assert sums[sum_[2]](int(sum_[1]), int(sum_[3])) == right, item
            checked += 1
        elif item["kind"] == "series":
            terms = [int(term) for term in item["context"].rstrip(",").split(", ")]
            assert {b - a for a, b in zip(terms, [*terms[1:], right], strict=True)} == {terms[1] - terms[0]}, item
            checked += 1
    assert checked == len(items) - sum(item["kind"] == "word_problem" for item in items)
    assert max(ranks.values()) - min(ranks.values()) <= len(items) // 20


def test_no_item_is_in_the_text_that_the_demo_learns_from() -> None:
    import gzip

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z']+", text.lower())
        return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}

    own = {run for task in _CHOICES for item in items_of(task) for c in item["choices"] for run in runs(whole(item, c))}
    assert len(own) > 3_000
    with gzip.open(Path(sources.__file__).parent / "builtin" / "classics.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            assert not own & runs(json.loads(line)["text"])
