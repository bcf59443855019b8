"""Filters: what each drops, what it keeps, and that they agree with the table."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.config.responses.filters import FILTERS, FilterConfig
from kdscale.config.responses.settings import ResponsesConfig
from kdscale.errors import ConfigError
from kdscale.responses.chat import Answer
from kdscale.responses.filters import Group, Tools, make_filters
from kdscale.responses.prompts import Prompt
from kdscale.runtime.progress import Reporter


def kept(entry: dict[str, Any], *groups: list[str], finish: str = "stop") -> list[list[str]]:
    settings = ResponsesConfig.model_validate({"prompts": [{"path": "p.txt"}], "filters": [entry]})
    tools = Tools(settings, lambda text: len(text.split()), Path("unused"), Reporter(quiet=True))
    prompt = Prompt([{"role": "user", "content": "?"}], "p.txt line 1")
    made = [Group(prompt, [Answer(text, finish) for text in texts]) for texts in groups]
    (one,) = make_filters(settings.filters, tools)
    for group in made:  # in parts, as a long run gives them
        one([group])
    assert {answer.dropped_by for group in made for answer in group.answers} <= {"", entry["name"]}
    return [[answer.text for answer in group.kept] for group in made]


@pytest.mark.parametrize("name", FILTERS)
def test_every_row_has_its_own_name_and_help_and_a_filter(name: str) -> None:
    row = FILTERS[name]
    assert row.model_fields["name"].default == name
    assert row.__doc__ != FilterConfig.__doc__
    assert callable(resolve_name(row.implementation))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, ["a", "a b c", "a b c d e f"]),
        ({"min_chars": 2}, ["a b c", "a b c d e f"]),
        ({"max_chars": 5}, ["a", "a b c"]),
        ({"min_tokens": 2, "max_tokens": 5}, ["a b c"]),
    ],
)
def test_length(entry: dict[str, Any], expected: list[str]) -> None:
    assert kept({"name": "length", **entry}, ["a", "a b c", "a b c d e f"]) == [expected]


def test_length_drops_what_was_cut_off() -> None:
    assert kept({"name": "length"}, ["whole enough"], finish="length") == [[]]
    assert kept({"name": "length", "cut_off": False}, ["whole enough"], finish="length") == [["whole enough"]]


LONG = "the river ran past an old mill and the children who lived there knew every stone of it by name and by touch"
NEAR = LONG.replace("touch", "heart")
OTHER = "a lighthouse keeper counts passing ships at night and writes each of their names in a book made of blue paper"


def test_duplicates_near_and_equal() -> None:
    assert kept({"name": "duplicates"}, [LONG, NEAR], [OTHER, f"{LONG.upper()}!"], [OTHER]) == [[LONG], [OTHER], []]
    equal = {"name": "duplicates", "similarity": None}
    assert kept(equal, [LONG, NEAR], [LONG]) == [[LONG, NEAR], []]
    assert kept({**equal, "within": "prompt"}, [LONG, LONG], [LONG]) == [[LONG], [LONG]]
    assert kept({"name": "duplicates", "similarity": 0.99}, [LONG, NEAR]) == [[LONG, NEAR]]
    assert kept({"name": "duplicates"}, ["yes", "no", "Yes."]) == [["yes", "no"]]


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I am sorry, I cannot provide this information.",
    "Sorry, but I am unable to do that.",
    "As an AI language model, I do not have opinions.",
    "I cannot assist with this request.",
    "I can’t help you with that.",
    "Unfortunately, I cannot answer this question.",
    "I must decline to write this.",
    "I will not create such content.",
    "That request goes against my guidelines.",
]
ANSWERS = [
    "A sorry sight met the travellers: they could not cross the river.",
    "The answer is 42.",
    "I cannot remember a colder winter, said the miller.",
    "You can't divide by zero, because no number times zero is one.",
    "As an assistant professor she wrote three books.",
    "In 1812 the army was unable to hold the town.",
    "Sorry is a word of four vowels and letters; in French one says pardon.",
]


def test_refusals_are_found_and_ordinary_answers_are_not() -> None:
    assert kept({"name": "refusals"}, REFUSALS) == [[]]
    assert kept({"name": "refusals"}, ANSWERS) == [ANSWERS]
    own = {"name": "refusals", "builtin": False, "patterns": ["^lo siento"]}
    assert kept(own, ["Lo siento, no puedo.", REFUSALS[0]]) == [[REFUSALS[0]]]
    late = "x" * 500 + REFUSALS[0]
    assert kept({"name": "refusals"}, [late]) == [[late]]


def test_vote_keeps_the_answers_that_most_agree_on() -> None:
    entry = {"name": "vote", "pattern": r"answer is (-?\d+)"}
    answers = ["1+1: the answer is 3. No, the answer is 2.", "the answer is 2", "the answer is 5", "I do not know"]
    assert kept(entry, answers) == [answers[:2]]
    assert kept({**entry, "min_share": 0.6}, answers) == [[]]
    assert kept(entry, ["nothing", "to count"]) == [[]]
    assert kept({"name": "vote", "pattern": r"\w+$"}, ["so Yes", "thus yes", "no"]) == [["so Yes", "thus yes"]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "the name of a filter"),
        ({"name": "lenght"}, "expected one of length, duplicates"),
        ({"name": "length", "min_char": 3}, "did you mean 'min_chars'"),
        ({"name": "length", "min_tokens": 9, "max_tokens": 3}, "max_tokens"),
        ({"name": "vote", "pattern": "("}, "regular expression"),
        ({"name": "vote"}, "pattern"),
        ({"name": "refusals", "patterns": ["a", "[z-a]"]}, "regular expression"),
        ({"name": "duplicates", "similarity": 0.1}, "similarity"),
        ({"name": "reward", "threshold": 0.5, "endpoint": {"base_url": "https://h/v1"}}, "needs model"),
        ({"name": "reward", "threshold": 0.5, "endpoint": {}, "path": "../x y"}, "path"),
    ],
)
def test_settings_that_cannot_work_are_refused(entry: dict[str, Any], message: str) -> None:
    responses = {"prompts": [{"path": "p.txt"}], "filters": [entry]}
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}, "responses": responses}
    with pytest.raises(ConfigError, match=message):
        build_config(tree, "test")
