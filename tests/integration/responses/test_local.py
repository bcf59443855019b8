"""The run's own teacher: answers that depend on prompts, seed and batch alone, whoever draws them and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.config.responses.settings import ResponsesConfig, SamplingConfig
from kdscale.errors import ConfigError, DataError
from kdscale.models.loading import load_model, load_tokenizer
from kdscale.responses.journal import Journal
from kdscale.responses.local import LocalTeacher, answer_share, local_key
from kdscale.responses.prompts import Prompt
from kdscale.runtime.progress import Reporter

PROMPTS = [
    Prompt([{"role": "user", "content": text}], "p")
    for text in ("The river", "An old mill stood by it", "Who", "Barley", "The river", "Name it: a stone", "In years")
]


@pytest.fixture
def teacher(chatting_llama_dir: Path) -> Callable[..., LocalTeacher]:
    model = load_model(chatting_llama_dir, dtype=torch.float32, device=torch.device("cpu"))
    model.generation_config.repetition_penalty = 5.0  # of the checkpoint: it must not count
    tokenizer = load_tokenizer(chatting_llama_dir)
    tokenizer.pad_token = None  # as Llama 3 has it

    def make(seed: int = 3, **sampling: Any) -> LocalTeacher:
        return LocalTeacher(model, tokenizer, SamplingConfig(**{"max_tokens": 6, **sampling}), seed)

    return make


def test_a_greedy_answer_is_that_of_the_prompt_alone(
    teacher: Callable[..., LocalTeacher], chatting_llama_dir: Path
) -> None:
    """Padding on the left changes nothing, and the checkpoint's own generation config does not count."""
    greedy = teacher(temperature=0.0)
    together = greedy.answer(PROMPTS[:4])
    assert together == [greedy.answer([prompt])[0] for prompt in PROMPTS[:4]]
    model = load_model(chatting_llama_dir, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = load_tokenizer(chatting_llama_dir)
    ids = list(tokenizer("user: The river<|end|>assistant: ", add_special_tokens=False)["input_ids"])
    begin = len(ids)
    while len(ids) < begin + 6:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    own = ids[begin : ids.index(0, begin) if 0 in ids[begin:] else None]
    assert together[0]["answers"][0]["text"] == tokenizer.decode(own, skip_special_tokens=True)
    assert (together[0]["prompt_tokens"], together[0]["answer_tokens"]) == (begin, len(own))


def answered(teacher: LocalTeacher, folder: Path, ranks: int, until: int | None = None) -> dict[str, Any]:
    """What `ranks` ranks leave; `until`: the appends after which a kill comes."""
    settings = ResponsesConfig.model_validate({"prompts": [{"path": "p"}], "sampling": {"n": 2}})
    key = local_key(settings, 3, CHECKPOINT, "template")
    for rank in range(ranks):
        journal = Journal(folder, f"answers-{rank}")
        left = [until]
        append = journal.append

        def die_in_time(name: str, append: Any = append, left: Any = left, **record: Any) -> None:
            if left[0] is not None:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
            append(name, **record)

        journal.append = die_in_time  # type: ignore[method-assign]
        pairs = ((key(prompt), prompt) for prompt in PROMPTS)
        with Reporter(quiet=True).bar("answer", 6, "prompts") as bar:
            try:
                answer_share(teacher, pairs, journal, 2, bar, rank=rank, ranks=ranks)
            except KeyboardInterrupt:
                assert until is not None
        journal.close()
    journal = Journal(folder)
    return {key(prompt): journal.get(key(prompt)) if key(prompt) in journal else None for prompt in PROMPTS}


CHECKPOINT = Path()


def test_ranks_and_kills_change_no_answer(
    teacher: Callable[..., LocalTeacher], tmp_path: Path, chatting_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "CHECKPOINT", chatting_llama_dir)
    sampled = teacher(n=2, temperature=1.0)
    alone = answered(sampled, tmp_path / "alone", 1)
    assert len(alone) == 6
    assert all(len(record["answers"]) == 2 for record in alone.values())
    assert answered(sampled, tmp_path / "two", 2) == alone
    for until in (1, 2, 3):  # also in the middle of a batch
        broken = answered(sampled, tmp_path / str(until), 1, until)
        assert sum(record is not None for record in broken.values()) == until
        assert answered(sampled, tmp_path / str(until), 1) == alone
    files = sorted((tmp_path / "two").iterdir())
    keys = [json.loads(line)["key"] for file in files for line in file.read_text().splitlines()]
    assert len(files) == 2
    assert len(keys) == len(set(keys)) == 6
    other = answered(teacher(seed=4, n=2, temperature=1.0), tmp_path / "seed", 1)
    assert other != alone


def test_what_cannot_be_answered_is_refused(teacher: Callable[..., LocalTeacher], tiny_llama_dir: Path) -> None:
    with pytest.raises(DataError, match=r"at most 512 tokens(.|\n)*max_tokens = 500"):
        teacher(max_tokens=500).answer(PROMPTS[:1])
    with pytest.raises(ConfigError, match="chat template"):
        LocalTeacher(None, load_tokenizer(tiny_llama_dir), SamplingConfig(), 0)
