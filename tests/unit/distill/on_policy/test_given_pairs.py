"""Pairs of answers from files: what they may look like, which tokens they are, and where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.distill.on_policy import PreferencesConfig
from kdscale.data.batches import NO_ANSWER
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.readers.chat import ChatTemplate
from kdscale.distill.on_policy.given_pairs import GivenPairs, read_pairs
from kdscale.distill.on_policy.packed_answers import Answer
from kdscale.distill.on_policy.samples import Share
from kdscale.errors import DataError
from kdscale.models.loading import load_tokenizer
from kdscale.responses.pairs import Pairs

USER = {"role": "user", "content": "the mill"}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def settings(folder: Path, *records: Any, **more: Any) -> PreferencesConfig:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PreferencesConfig(**{"pairs": [{"path": str(file)}], "prompt_tokens": 16, "max_new_tokens": 8, **more})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "the mill", "chosen": "ran", "rejected": "fell"},
        {"prompt": [USER], "chosen": [answer("ran")], "rejected": [answer("fell")]},
        {"chosen": [USER, answer("ran")], "rejected": [USER, answer("fell")]},
    ],
)
def test_a_pair_may_be_texts_or_chats(tmp_path: Path, record: dict[str, Any]) -> None:
    (pair,) = Pairs(settings(tmp_path, record))
    assert (pair.messages, pair.chosen, pair.rejected) == ([USER], "ran", "fell")
    (pair,) = Pairs(settings(tmp_path, record, system="Be brief."))
    assert pair.messages == [{"role": "system", "content": "Be brief."}, USER]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"line 1, field 'rejected'"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, r"line 1, field 'chosen'"),
        ({"chosen": [USER, answer("b")], "rejected": [answer("c")]}, "chats that differ before the last answer"),
        ({"chosen": "b", "rejected": "c"}, r"line 1, field 'prompt'"),
        ({"prompt": [answer("a")], "chosen": "b", "rejected": "c"}, "messages of which the last is a user's"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, r"line 1, field 'prompt'"),
        ({"prompt": "a", "chosen": [USER], "rejected": "c"}, "ends with one of the assistant's"),
        ([1], "JSON object"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Pairs(settings(tmp_path, record)))


def test_a_file_that_is_not_there_and_one_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"preferences\.pairs: .*gone\.jsonl"):
        list(Pairs(PreferencesConfig(pairs=[{"path": str(tmp_path / "gone.jsonl")}])))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="holds no pair"):
        list(Pairs(settings(tmp_path)))


def test_tokens_are_those_of_the_template_and_an_answer_ends_with_its_end(tmp_path: Path, tiny_llama_dir: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_llama_dir)
    long = {"prompt": "the mill", "chosen": "ran " * 30, "rejected": "fell"}
    chosen = settings(tmp_path, {"prompt": "the mill", "chosen": "ran", "rejected": "fell by"}, long)
    said: list[str] = []
    (plain,) = read_pairs(chosen, tokenizer, ChatTemplate(tokenizer), [5], 0, said.append)
    assert [tokenizer.decode(one.prompt[1:]) for one in plain] == ["the mill"] * 2
    assert [tokenizer.decode(one.ids) for one in plain] == ["ran<|end|>", "fell by<|end|>"]
    assert all(one.prompt[0] == 5 for one in plain)
    assert said == ["1 of 2 pairs are left out, as they have more than 16 tokens of prompt or 8 of an answer"]
    roomy = chosen.model_copy(update={"prompt_tokens": 64})
    (chat,) = read_pairs(roomy, tokenizer, ChatTemplate(tokenizer, TEMPLATE), [5], 0, said.append)
    assert [tokenizer.decode(one.prompt) for one in chat] == ["[user]the mill<|end|>[assistant]"] * 2
    assert [tokenizer.decode(one.ids) for one in chat] == ["ran<|end|>", "fell by<|end|>"]
    with pytest.raises(DataError, match="at least one pair of at most 1 tokens of prompt"):
        read_pairs(roomy.model_copy(update={"prompt_tokens": 1}), tokenizer, ChatTemplate(tokenizer), [5], 0, print)


def given(share: Share, count: int = 41) -> GivenPairs:
    pairs = [(Answer(0, [100 + n, 1], [200 + n, 2]), Answer(0, [100 + n, 1], [300 + n])) for n in range(count)]
    entry = PreferencesConfig(prompt_tokens=3, max_new_tokens=2, share=1.0, validate_prompts=3)
    return GivenPairs(entry, share, pairs, seed=1, pad_id=9)


def test_pairs_stand_side_by_side_and_each_once_before_any_comes_again() -> None:
    own = given(Share(steps=8, global_batch=3, micro_batch=1, seq_len=21, rank=0, ranks=1))
    packed, logprobs_S, answers_S = own.sequence(0, 0)
    labelled = packed.labels_S != IGNORED_LABEL
    assert answers_S[labelled].tolist() == [0, 0, 1, 2, 2, 3] and set(answers_S[~labelled]) == {NO_ANSWER}
    first = packed.input_ids_S[0] - 100
    assert packed.input_ids_S[:7].tolist() == [100 + first, 1, 200 + first, 2, 100 + first, 1, 300 + first]
    assert packed.labels_S[:7].tolist() == [-100, 200 + first, 2, -100, -100, 300 + first, -100]
    assert packed.position_ids_S[:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 0] and not logprobs_S.any()
    held_out = {int(ids) - 100 for batch in own.held_out_batches() for ids in batch.input_ids_BS.flatten()
                if 100 <= ids < 200}  # fmt: skip
    assert held_out == {0, 20, 40}
    shown = [int(id_) - 100 for number in range(19) for id_ in own.sequence(number, 0).packed.input_ids_S[[0, 7]]]
    assert set(shown) == set(range(41)) - held_out and len(shown) == len(set(shown)) == 38


def test_ranks_share_the_held_out_pairs_and_have_as_many_batches() -> None:
    shares = [Share(steps=8, global_batch=4, micro_batch=1, seq_len=21, rank=rank, ranks=2) for rank in (0, 1)]
    counts = [[batch.own_counts for batch in given(share).held_out_batches()] for share in shares]
    assert counts == [[(6, 1, 2)], [(3, 1, 1)]]
