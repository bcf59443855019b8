"""Text for encoders: sentences, rows of whole documents, and hidden tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kdscale.config.distill.masking import MaskingConfig
from kdscale.data.batches import LoaderState, PackedLoader
from kdscale.data.encoders.classes import classified
from kdscale.data.encoders.masking import masked
from kdscale.data.encoders.whole_documents import DocumentRows
from kdscale.data.heldout import eval_batches
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.sentences import sentences
from kdscale.data.sources import Document
from kdscale.data.store_builder import class_number
from kdscale.data.store_format import UNKNOWN_CLASS
from kdscale.data.token_store import EncoderTokens
from kdscale.errors import ConfigError, DataError

CLS, SEP, MASK, PAD = 1, 2, 3, 0
TOKENS = EncoderTokens(end_tokens=1, mask_id=MASK, special_ids=(PAD, CLS, SEP, MASK), vocab=500)


@pytest.fixture
def split(make_split):
    """Documents of 10 to 16 tokens, each with its end, for rows that begin with [CLS]."""
    made = make_split([12, 5, 30, 7, 9, 3, 8, 11, 4, 6], prefix_ids=(CLS,))
    tokens = np.array(made.tokens_T) + 10
    tokens[made.offsets_D1[1:] - 1] = SEP
    return replace(made, tokens_T=tokens, eos_id=PAD, encoder=TOKENS)


def test_sentences_end_where_readers_say_so() -> None:
    text = (
        'He said "Go!" Mr. Brown left at 5 p.m. on J. Smith\'s horse... "Why?" she asked.\n\nA new one\ngoes on. (Yes.)'
    )
    assert list(sentences(text)) == [
        'He said "Go!"', "Mr. Brown left at 5 p.m. on J. Smith's horse...", '"Why?" she asked.',
        "A new one goes on.", "(Yes.)",
    ]  # fmt: skip


def test_rows_hold_every_document_whole_with_both_ends(split) -> None:
    rows = DocumentRows(split, seq_len=16, seed=4)
    seen = []
    for number in range(rows.sequences):
        row = rows.sequence(0, number)
        begins = np.flatnonzero(row.input_ids_S == CLS)
        assert len(begins) == len(row.document_ids)
        for begin, document in zip(begins, row.document_ids, strict=True):
            size = min(16, 1 + int(split.lengths[document]))
            assert row.input_ids_S[begin + size - 1] == SEP
            assert (row.position_ids_S[begin : begin + size] == np.arange(size)).all()
            assert (row.input_ids_S[begin + 1 : begin + size - 1] == split.document_tokens(document)[: size - 2]).all()
        filled = row.labels_S != IGNORED_LABEL
        assert (row.labels_S[filled] == row.input_ids_S[filled]).all()
        assert (row.input_ids_S[~filled] == PAD).all() and (row.position_ids_S[~filled] == 0).all()
        assert rows.lengths(0, number) == [min(16, 1 + int(split.lengths[d])) for d in row.document_ids] + [1] * int(
            (~filled).sum()
        )
        seen += row.document_ids
    assert sorted(seen) == list(range(10))
    epochs = [[tuple(rows.sequence(epoch, n).document_ids) for n in range(rows.sequences)] for epoch in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_a_row_without_room_for_text_is_refused(split) -> None:
    with pytest.raises(DataError, match="no room"):
        DocumentRows(split, seq_len=2, seed=0)


def test_hidden_tokens_follow_the_seed_and_the_number_alone(split) -> None:
    sequence = DocumentRows(split, 64, seed=0).sequence(0, 0)
    settings = MaskingConfig(share=0.3)
    first, again = (masked(sequence, TOKENS, settings, ("train", 7), 5) for _ in range(2))
    assert (first.input_ids_S == again.input_ids_S).all() and (first.labels_S == again.labels_S).all()
    others = [masked(sequence, TOKENS, settings, key, seed) for key, seed in ((("train", 8), 5), (("train", 7), 6))]
    assert all((other.labels_S != first.labels_S).any() for other in others)
    chosen = first.labels_S != IGNORED_LABEL
    assert (first.labels_S[chosen] == sequence.input_ids_S[chosen]).all()
    assert not np.isin(first.labels_S[chosen], TOKENS.special_ids).any()
    assert (first.input_ids_S[~chosen] == sequence.input_ids_S[~chosen]).all()


def test_shares_of_hidden_tokens_are_those_of_the_config(make_split) -> None:
    long = replace(make_split([4000]), encoder=TOKENS)
    sequence = DocumentRows(long, 4000, seed=0).sequence(0, 0)
    sequence = sequence._replace(input_ids_S=np.full(4000, 77), labels_S=np.full(4000, 77))
    settings = MaskingConfig(share=0.2, random=0.25, same=0.25)
    hidden = masked(sequence, TOKENS, settings, ("train", 0), 1)
    chosen = hidden.labels_S != IGNORED_LABEL
    assert chosen.mean() == pytest.approx(0.2, abs=0.03)
    ids = hidden.input_ids_S[chosen]
    assert (ids == MASK).mean() == pytest.approx(0.5, abs=0.06)
    assert (ids == 77).mean() == pytest.approx(0.25, abs=0.06)


def test_the_loader_resumes_and_divides_among_ranks_as_it_does_for_decoders(split) -> None:
    settings = {"seq_len": 16, "global_batch": 4, "seed": 3, "task": MaskingConfig()}
    whole = PackedLoader(split, micro_batch=4, **settings)
    (ahead,), _ = next(PackedLoader(split, micro_batch=4, **settings).batches(LoaderState(3)))
    assert (ahead.input_ids_BS == whole.step(3)[0].input_ids_BS).all()
    ranks = [PackedLoader(split, micro_batch=1, rank=rank, world=2, **settings) for rank in range(2)]
    rows = [batch.input_ids_BS[0].tolist() for rank in ranks for batch in rank.step(3)]
    assert rows == whole.step(3)[0].input_ids_BS.tolist()


def test_a_text_is_hidden_otherwise_in_the_next_epoch(split) -> None:
    loader = PackedLoader(split, 64, 1, 1, seed=0, shuffle=False, task=MaskingConfig(share=0.4))
    assert loader.epoch_sequences > 1
    first, second = loader.sequence(0), loader.sequence(loader.epoch_sequences)
    assert first.document_ids == second.document_ids
    assert (first.labels_S != second.labels_S).any()


def test_held_out_documents_are_whole_and_their_hidden_tokens_stay_the_same(split) -> None:
    plain = eval_batches(split, 32, 2, 60)
    assert 60 <= sum(batch.token_count for batch in plain) <= 60 + 31
    first, again = (eval_batches(split, 32, 2, 60, task=MaskingConfig()) for _ in range(2))
    assert all((a.input_ids_BS == b.input_ids_BS).all() for a, b in zip(first, again, strict=True))
    labels = [(a.labels_BS, b.input_ids_BS) for a, b in zip(first, plain, strict=True)]
    assert all((hidden == IGNORED_LABEL).logical_or(hidden == text).all() for hidden, text in labels)


@pytest.mark.parametrize("encoder", [None, TOKENS._replace(mask_id=None)])
def test_hiding_tokens_needs_an_encoder_with_a_mask_token(split, encoder) -> None:
    with pytest.raises(ConfigError, match=r"distill\.masking"):
        PackedLoader(replace(split, encoder=encoder), 16, 1, 1, seed=0, task=MaskingConfig())


def test_each_document_has_one_label_which_is_its_class(split) -> None:
    known = np.array([0, 2, UNKNOWN_CLASS, 1, 0, 2, 1, 1, 0, UNKNOWN_CLASS], np.int32)
    split = replace(split, classes_D=known)
    loader = PackedLoader(split, 32, 2, 2, seed=4, task="classes")
    plain = PackedLoader(split, 32, 2, 2, seed=4)
    for number in range(plain.epoch_sequences):
        row, before = loader.sequence(number), plain.sequence(number)
        begins = np.flatnonzero(row.input_ids_S == CLS)
        assert row.labels_S[begins].tolist() == known[row.document_ids].tolist()
        assert (np.delete(row.labels_S, begins) == IGNORED_LABEL).all()
        assert (row.input_ids_S == before.input_ids_S).all()
    assert classified(before, replace(split, classes_D=None)).labels_S.max() == UNKNOWN_CLASS  # none is known
    held_out = eval_batches(replace(split, token_bytes_T=split.tokens_T), 32, 2, 10**6, task="classes")
    assert sum(batch.token_count for batch in held_out) == split.documents


@pytest.mark.parametrize(("said", "number"), [(None, UNKNOWN_CLASS), (1, 1), ("bad", 0), ("good", 1)])
def test_a_class_is_a_number_or_a_name(said, number) -> None:
    assert class_number(Document("text", "file", 3, class_=said), ("bad", "good")) == number


@pytest.mark.parametrize(
    ("said", "names"), [(2, ("bad", "good")), (-1, ("bad", "good")), ("ugly", ("bad", "good")), (0, ())]
)
def test_a_class_that_the_teacher_does_not_tell_is_refused(said, names) -> None:
    with pytest.raises(DataError, match=f"document 3 of file is of the class {said!r}"):
        class_number(Document("text", "file", 3, class_=said), names)
