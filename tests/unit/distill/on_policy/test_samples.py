"""Which places of a sequence are learnt, and what a rank without any work of its own does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from kdscale.config.distill.on_policy import OnPolicyConfig
from kdscale.data.packing import IGNORED_LABEL
from kdscale.distill.on_policy.prompts import Prompt
from kdscale.distill.on_policy.samples import Samples, Share, highest
from kdscale.distill.on_policy.writers import Asked, uniforms_of
from kdscale.errors import RunFolderError, TrainingError
from kdscale.models.generation.drawing import Drawn


class Book:
    def of(self, number: int, slot: int) -> Prompt:
        return Prompt([number, slot, 7], tag=slot)

    def held_out(self, count: int) -> list[Prompt]:
        return [Prompt([50 + number, 1]) for number in range(count)]


class Writer:
    """Writes two tokens, the second after the first: 100 + the prompt's first, 200 + its second."""

    at_once, whole_batches = 2, True

    def __init__(self, logprob: float = -0.5):
        self.calls: list[int] = []
        self._logprob = logprob

    @contextmanager
    def weights(self) -> Iterator[None]:
        yield

    def write(self, asked: Sequence[Asked]) -> list[Drawn | None]:
        self.calls.append(len(asked))
        return [Drawn([100 + one.ids[0], 200 + one.ids[1]], [self._logprob, -1.5], [0.1, 0.9], True) for one in asked]

    def close(self) -> None:
        pass


def make(folder: Path, writer: Writer, share: Share | None = None, **settings: object) -> Samples:
    own = OnPolicyConfig(**{"share": 1.0, "prompt_tokens": 3, "max_new_tokens": 2, **settings})  # type: ignore[arg-type]
    share = share or Share(steps=4, global_batch=2, micro_batch=1, seq_len=12, rank=0, ranks=1)
    return Samples(
        own, share, Book(), writer, folder, seed=1, pad_id=9, vocab_size=1000, say=lambda message: None,
        decode=lambda ids: " ".join(map(str, ids)),
    )  # fmt: skip


def test_a_sequence_holds_prompts_with_their_answers_and_only_these_are_labels(tmp_path: Path) -> None:
    samples, none = make(tmp_path, writer := Writer(), every=2), IGNORED_LABEL
    assert samples.prepare(0) and not samples.prepare(1) and samples.holds(1) and not samples.holds(2)
    assert writer.calls == [2, 2, 2, 2]  # two steps, two sequences, two prompts in each
    written = samples.sequence(1, 0)
    assert written.packed.input_ids_S.tolist() == [1, 0, 7, 101, 200, 1, 1, 7, 101, 201, 9, 9]
    assert written.packed.position_ids_S.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert written.packed.labels_S.tolist() == [none, none, 101, 200, none] * 1 + [
        none,
        none,
        101,
        201,
        none,
        none,
        none,
    ]
    assert written.packed.tags_S.tolist() == [0] * 5 + [1] * 5 + [0, 0]
    np.testing.assert_allclose(written.logprobs_S[[2, 3, 7, 8]], [-0.5, -1.5, -0.5, -1.5])
    assert not written.logprobs_S[[0, 1, 4, 5, 6, 9, 10, 11]].any()


def test_only_the_positions_of_the_highest_entropy_are_labels(tmp_path: Path) -> None:
    samples = make(tmp_path, Writer(), positions="entropy", position_share=0.5)
    samples.prepare(0)
    labels = samples.sequence(0, 0).packed.labels_S
    assert np.flatnonzero(labels != IGNORED_LABEL).tolist() == [3, 8]
    assert highest([0.3, 0.9, 0.3, 0.5], 0.5) == [1, 3] and highest([0.3, 0.3], 0.1) == [0]


def test_what_other_ranks_wrote_is_found_on_the_disk_for_reports(tmp_path: Path) -> None:
    shares = [Share(4, 2, 1, 12, rank, 2) for rank in (0, 1)]
    mine, other = make(tmp_path, Writer(), shares[0]), make(tmp_path, Writer(), shares[1])
    mine.prepare(0)
    assert not (mine.sequence(1, 0).packed.labels_S != IGNORED_LABEL).any()  # nothing yet
    other._journal = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdscale.distill.on_policy.samples.rank", lambda: 1)
        other.prepare(0)
    assert mine.sequence(1, 0).packed.input_ids_S.tolist() == other.sequence(1, 0).packed.input_ids_S.tolist()


def test_held_out_prompts_are_answered_in_as_many_batches_on_every_rank(tmp_path: Path) -> None:
    looks: list[int] = []
    for rank in (0, 1):
        share, count = Share(4, 2, 1, 12, rank, 2), len(looks)
        batches = make(tmp_path, Writer(), share, validate_prompts=5).held_out_batches(lambda: looks.append(1))
        assert len(batches) == 2 and len(looks) - count == 2  # three sequences for two ranks
        assert [batch.token_count for batch in batches] == ([4, 2] if rank == 0 else [4, 0])
        assert all(batch.own is not None and batch.own.is_own_B.all() for batch in batches)
    assert make(tmp_path, Writer(), validate_prompts=0).held_out_batches() == []


def test_numbers_that_are_not_finite_end_the_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="after step 0 the student writes by probabilities that are not finite"):
        make(tmp_path, Writer(float("nan"))).prepare(0)


@pytest.mark.parametrize(
    "damage",
    [{"ids": [1, 2000]}, {"ids": []}, {"ids": [-1, 2]}, {"ids": [1, 2, 3]}, {"ids": "ab"}, {"ids": None},
     {"logprobs": [0.1]}, {"logprobs": None}, {"learnt": [2]}],
)  # fmt: skip
def test_a_record_that_was_changed_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    make(tmp_path, Writer()).prepare(0)
    file = tmp_path / "rank-0.jsonl"
    first, *lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), **damage}), *lines]) + "\n")
    with pytest.raises(RunFolderError, match="what was written for sequence 0, prompt 0, is damaged"):
        make(tmp_path, Writer()).prepare(0)


def test_each_prompt_has_random_numbers_of_its_own() -> None:
    one, two = (uniforms_of(Asked([1], seed), 5) for seed in ("a", "b"))
    assert one.dtype == torch.float64 and not torch.equal(one, two)
    assert torch.equal(one, uniforms_of(Asked([2, 3], "a"), 5)) and one.min() >= 0 and one.max() < 1
