"""The loader: same tokens for any number of processes, resumable at any step; eval batches exact and spread."""

from __future__ import annotations

import json
import math
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.data.batches import Batch, LoaderState, PackedLoader
from kdscale.data.heldout import eval_batches
from kdscale.data.packing import IGNORED_LABEL
from kdscale.distill.step import to_device
from kdscale.errors import ConfigError, DataError
from kdscale.models.documents import Documents

LENGTHS = [7, 30, 2, 12, 19, 5, 44, 3, 9, 16]


def rows(batches: list[Batch]) -> list[tuple[list[int], ...]]:
    keys = ("input_ids_BS", "position_ids_BS", "labels_BS")
    return [row for b in batches for row in zip(*(getattr(b, key).tolist() for key in keys), strict=True)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_global_order_does_not_depend_on_the_layout(make_split, world, micro):
    split = make_split(LENGTHS)
    reference = PackedLoader(split, 8, 16, 16, seed=3)
    ranks = [PackedLoader(split, 8, 16, micro, seed=3, rank=r, world=world) for r in range(world)]
    for step in range(4):  # 18 sequences an epoch: the steps run over its end
        parts = [rank.step(step) for rank in ranks]
        assert all(b.input_ids_BS.shape == (micro, 8) for part in parts for b in part)
        assert [row for part in parts for row in rows(part)] == rows(reference.step(step))
        assert [d for part in parts for b in part for d in b.document_ids] == reference.step(step)[0].document_ids


def test_resume_anywhere_gives_the_rest(make_split):
    split = make_split(LENGTHS)

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.integers(0, 12), st.integers(0, 2**32), st.booleans())
    def check(stop, seed, shuffle):
        whole = list(islice(PackedLoader(split, 8, 4, 2, seed=seed, shuffle=shuffle).batches(LoaderState()), 14))
        state = whole[stop - 1][1] if stop else LoaderState()
        saved = LoaderState.from_json(json.loads(json.dumps(state.to_json())))
        rest = islice(PackedLoader(split, 8, 4, 2, seed=seed, shuffle=shuffle).batches(saved), 14 - stop)
        assert [rows(b) for b, _ in rest] == [rows(b) for b, _ in whole[stop:]]

    check()


def test_short_sequences_first_have_the_tokens_of_a_step_and_go_on_where_they_were(make_split):
    """8 rows of 4, then 4 of 8, then 2 of 16: 32 tokens a step, every token once in an epoch, on any ranks."""
    split = make_split([7, 30, 2, 12, 19, 5, 44, 3, 22, 16])  # 160 tokens: 5 steps an epoch
    phases = [(2, 4), (4, 8)]
    whole = PackedLoader(split, 16, 2, 2, seed=3, shorter_first=phases)
    shapes = [tuple(whole.step(step)[0].input_ids_BS.shape) for step in range(6)]
    assert shapes == [(8, 4), (8, 4), (4, 8), (4, 8), (2, 16), (2, 16)]
    tokens = [t for step in range(5) for t in whole.step(step)[0].input_ids_BS.flatten().tolist()]
    assert sorted(tokens) == sorted(split.tokens_T.tolist())
    assert rows(whole.step(1)) == rows(PackedLoader(split, 4, 8, 8, seed=3).step(1))
    halves = [PackedLoader(split, 16, 2, 1, seed=3, rank=r, world=2, shorter_first=phases) for r in range(2)]
    for step in range(6):
        assert rows([batch for half in halves for batch in half.step(step)]) == rows(whole.step(step))
        assert [d["number"] for d in whole.describe(step)] == [key.number for key in whole.step(step)[0].sequences]
        assert tuple(whole.document_lengths(step)) == Documents.of(whole.step(step)[0].position_ids_BS).lengths
    resumed = [rows(batches) for batches, _ in islice(halves[0].batches(LoaderState(1)), 4)]
    assert resumed == [rows(halves[0].step(step)) for step in range(1, 5)]


def test_epochs_differ_and_shuffle_off_keeps_order(make_split):
    split = make_split(LENGTHS)
    loader = PackedLoader(split, 8, 1, 1, seed=0)
    n = loader.epoch_sequences
    first, second = ([loader.sequence(e * n + i).input_ids_S.tolist() for i in range(n)] for e in (0, 1))
    assert first != second
    plain = PackedLoader(split, 8, 1, 1, seed=0, shuffle=False)
    assert [t for i in range(n) for t in plain.sequence(i).input_ids_S] == split.tokens_T[: n * 8].tolist()


@pytest.mark.parametrize("prefix", [(), (1, 2)])
def test_the_lengths_of_a_steps_documents_are_known_without_its_tokens(make_split, prefix, monkeypatch):
    split = make_split(LENGTHS, prefix_ids=prefix)
    loader = PackedLoader(split, 8, 8, 2, seed=3, rank=1, world=2)
    whole = PackedLoader(split, 8, 8, 8, seed=3)
    want = [Documents.of(whole.step(step)[0].position_ids_BS).lengths for step in range(5)]
    monkeypatch.setattr(type(split), "document_tokens", None)
    assert [tuple(loader.document_lengths(step)) for step in range(5)] == want


def test_batch_types(make_split):
    (batch,), state = next(PackedLoader(make_split(LENGTHS), 8, 2, 2, seed=0).batches())
    assert state == LoaderState(1)
    assert {t.dtype for t in (batch.input_ids_BS, batch.position_ids_BS, batch.labels_BS)} == {torch.int64}
    assert batch.token_count == sum(label != IGNORED_LABEL for row in batch.labels_BS.tolist() for label in row)


def test_refusals(make_split):
    split = make_split(LENGTHS)
    with pytest.raises(ConfigError, match="global_batch"):
        PackedLoader(split, 8, 6, 2, seed=0, rank=0, world=2)
    with pytest.raises(ConfigError, match="rank"):
        PackedLoader(split, 8, 4, 1, seed=0, rank=2, world=2)
    with pytest.raises(DataError, match="at least one sequence"):
        PackedLoader(split, 1000, 4, 1, seed=0)
    for bad in ({}, {"step": -1}, {"step": "1"}, {"step": True}, {"step": 1, "x": 2}):
        with pytest.raises(DataError, match="damaged"):
            LoaderState.from_json(bad)


def test_eval_counts_are_exact(make_split):
    split = make_split(LENGTHS, labels=[0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    available = sum(min(n - 1, 10) for n in LENGTHS)

    @settings(max_examples=40, deadline=None, database=None)
    @given(st.integers(1, 120), st.integers(1, 5), st.integers(0, 9))
    def check(max_tokens, micro, seed):
        batches = eval_batches(split, 10, micro, max_tokens, seed)
        assert sum(b.token_count for b in batches) == min(max_tokens, available)
        assert [b.input_ids_BS.shape[0] for b in batches[:-1]] == [micro] * (len(batches) - 1)
        for batch in batches:
            labels = batch.labels_BS[batch.labels_BS != IGNORED_LABEL]
            # the fixture's tokens stand for (value mod 5) bytes
            assert batch.text_bytes == int((labels % 5).sum())
            followed = batch.labels_BS != IGNORED_LABEL
            assert torch.equal(batch.labels_BS[followed], batch.input_ids_BS[followed] + 1)
            assert torch.equal(batch.position_ids_BS[followed], batch.input_ids_BS[followed] % 1000)
            assert not batch.position_ids_BS[~followed].any(), "padding is made of documents of one token"

    check()


def test_eval_counts_the_labels_of_answers_alone(make_split):
    split = make_split(LENGTHS, is_label=[n % 3 == 0 for n in range(sum(LENGTHS))])
    known = {int(t) for n, t in enumerate(split.tokens_T) if n % 3 == 0}
    within = {int(t) for d in range(split.documents) for t in split.document_tokens(d)[1:11]}

    @settings(max_examples=30, deadline=None, database=None)
    @given(st.integers(1, 60))
    def check(max_tokens):
        batches = eval_batches(split, 10, 2, max_tokens)
        labels = [t for b in batches for t in b.labels_BS[b.labels_BS != IGNORED_LABEL].tolist()]
        assert len(labels) == len(set(labels)) == min(max_tokens, len(known & within))
        assert set(labels) <= known
        assert sum(b.text_bytes for b in batches) == sum(t % 5 for t in labels)

    check()


def test_held_out_text_without_a_label_in_reach_is_refused(make_split):
    split = make_split([20, 30], is_label=[n in (15, 19, 45) for n in range(50)])
    assert sum(batch.token_count for batch in eval_batches(split, 16, 2, 99)) == 1
    with pytest.raises(DataError, match="first 8 tokens"):
        eval_batches(split, 8, 2, 99)


def test_rows_know_the_tag_of_their_source(make_split):
    split = make_split(LENGTHS, labels=[0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    batches = [PackedLoader(split, 8, 4, 4, seed=1).step(0)[0], *eval_batches(split, 10, 2, 60)]
    for batch in batches:
        micro_batch = to_device(batch, torch.device("cpu"))
        of_document = torch.as_tensor(split.tags_D)[micro_batch.labels_N // 1000 - 1]
        assert torch.equal(micro_batch.tags_N, of_document)


def test_eval_scores_the_same_text_with_a_prefix(make_split):
    split, plain = make_split(LENGTHS, prefix_ids=(3, 4)), make_split(LENGTHS)
    with_prefix, without = eval_batches(split, 12, 3, 10**6), eval_batches(plain, 10, 3, 10**6)
    labels = [torch.cat([b.labels_BS[b.labels_BS != IGNORED_LABEL] for b in side]) for side in (with_prefix, without)]
    assert torch.equal(labels[0].sort().values, labels[1].sort().values)
    assert sum(b.text_bytes for b in with_prefix) == sum(b.text_bytes for b in without)
    for batch in with_prefix:
        for ids, positions, wanted in zip(batch.input_ids_BS, batch.position_ids_BS, batch.labels_BS, strict=True):
            for start in ((ids != split.eos_id) & (positions == 0)).nonzero().flatten().tolist():
                assert ids[start : start + 2].tolist() == [3, 4]
                assert wanted[start : start + 2].tolist() == [IGNORED_LABEL] * 2
                assert positions[start : start + 3].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="no room"):
        eval_batches(split, 2, 1, 10)


def test_eval_takes_many_sources_in_turn_quickly(make_split):
    split = make_split([3] * 3000, labels=[*range(2999), 0])
    assert sum(batch.token_count for batch in eval_batches(split, 2, 64, 10**6)) == 6000


def test_eval_is_deterministic_and_spread(make_split):
    split = make_split([30] * 20, labels=[0] * 14 + [1] * 4 + [2] * 2)
    first, again = (eval_batches(split, 16, 2, 16 * 6) for _ in range(2))
    assert [rows([b]) for b in first] == [rows([b]) for b in again]
    documents = [d for b in first for d in b.document_ids]
    assert len(set(documents)) == 6
    assert [split.labels_D[d] for d in documents] == [0, 1, 2, 0, 1, 2], "sources in turn"
    assert rows(eval_batches(split, 16, 2, 96, seed=1)) != rows(first)


def test_eval_bits_per_byte_of_a_uniform_model(make_split):
    """A model that gives each of 320 tokens the same chance needs log2(320) bits a label."""
    split = make_split(LENGTHS)
    (batch,) = eval_batches(split, 16, 100, 10**6)
    nats = batch.token_count * math.log(320)
    scored = [t for n, d in ((n, d) for d, n in enumerate(LENGTHS)) for t in split.document_tokens(d)[1 : min(n, 17)]]
    assert batch.token_count == len(scored)
    bits_per_byte = nats / (math.log(2) * batch.text_bytes)
    assert bits_per_byte == pytest.approx(len(scored) * math.log2(320) / sum(int(t) % 5 for t in scored))


@given(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 5))
def test_every_label_is_in_one_slice(rows, slices, seed):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.where(
        torch.rand(rows, 12, generator=gen) < 0.3, -100, torch.randint(0, 9, (rows, 12), generator=gen)
    )
    batch = Batch(labels.clone(), labels.clone(), labels, torch.zeros_like(labels), [])
    batches = [batch.with_label_slice(number, slices) for number in range(slices)]
    assert sum(sliced.token_count for sliced in batches) == batch.token_count
    assert torch.equal(torch.stack([sliced.labels_BS for sliced in batches]).amax(0), labels)
    for number, sliced in enumerate(batches):
        columns = (sliced.labels_BS != -100).any(0).nonzero().flatten()
        assert all(number * 12 // slices <= int(c) < (number + 1) * 12 // slices for c in columns)
        assert torch.equal(sliced.input_ids_BS, batch.input_ids_BS)
