"""What a teacher with other tokens says of the student's: bytes, places, probabilities, against a slow twin in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdscale.config.distill.targets import Needs
from kdscale.models.tokenizer.token_bytes import Vocabulary, VocabularyMap
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets, TopKTargets
from kdscale.teacher.vocabulary.across import AcrossTokenizers
from kdscale.teacher.vocabulary.alignment import retell
from tests.unit.teacher.vocabulary.conftest import TEXTS

PAIRS = [("few", "many"), ("many", "few"), ("sentence", "many"), ("many", "sentence")]


def random_logits(ids_BP: np.ndarray, rows_M: np.ndarray, size: int) -> torch.Tensor:
    """Of each row, from the tokens up to it: a teacher that has read the same says the same."""
    flat, width, out = ids_BP.reshape(-1), ids_BP.shape[1], []
    for row in rows_M.tolist():
        seed = hash(tuple(flat[row - row % width : row + 1].tolist())) % 2**31
        out.append(torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2)
    return torch.stack(out)


class Teacher:
    """A source that knows its tokens alone; it keeps what it was asked."""

    def __init__(self, vocabulary: Vocabulary, top_k: int | None = None, temperature: float = 1.0):
        self.model, self.gives = nn.Linear(1, 1), Needs(top_k=vocabulary.size)
        self.size, self.top_k, self.temperature, self.closed = vocabulary.size, top_k, temperature, False

    def prefetch(self, batch: MicroBatch) -> None:
        raise AssertionError("asked ahead")

    def targets(self, batch: MicroBatch) -> Targets:
        logits_MV = random_logits(batch.input_ids_BS.numpy(), batch.rows_N.numpy(), self.size)
        top = logits_MV.topk(self.top_k or self.size, dim=1)
        lse_M = (logits_MV / self.temperature).logsumexp(1)
        found = TopKTargets(top.indices, top.values.float(), lse_M.float(), self.temperature, self.size)
        return Targets(rows=batch.rows, top_k=found)

    def close(self) -> None:
        self.closed = True


def batch_of(vocabulary: Vocabulary, texts: list[str], cut: slice = slice(None)) -> MicroBatch:
    """The texts as documents of one sequence; of each, the tokens in `cut`, and all that can be predicted."""
    ids, positions, rows, labels = [], [], [], []
    for text in texts:
        tokens = [*vocabulary.encoder.encode([text])[0].ids.tolist(), vocabulary.end][cut]
        own = [*vocabulary.prefix, *tokens]
        first = max(len(vocabulary.prefix), 1)
        rows += [len(ids) + number - 1 for number in range(first, len(own))]
        labels += own[first:]
        ids += own
        positions += range(len(own))
    tensors = [torch.tensor([values]) for values in (ids, positions)]
    return MicroBatch(*tensors, torch.tensor(rows), torch.tensor(labels), (("train", len(ids)),))


def dense(targets: TopKTargets) -> torch.Tensor:
    """Probabilities [N, V] of the student's tokens; an id that comes twice counts twice, as an error would."""
    p_NK = (targets.logits_NK.double() / targets.temperature - targets.lse_N.double()[:, None]).exp()
    return torch.zeros(len(p_NK), targets.vocab_size, dtype=torch.float64).scatter_add(1, targets.ids_NK, p_NK)


def across(teacher: str, student: str, vocabularies: Any, **options: Any) -> tuple[AcrossTokenizers, VocabularyMap]:
    pair = VocabularyMap(vocabularies(teacher), vocabularies(student))
    return AcrossTokenizers(Teacher(vocabularies(teacher), **options), pair, Needs(top_k=64)), pair


@pytest.mark.parametrize("name", ["few", "many", "sentence"])
@settings(max_examples=25)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_the_bytes_of_tokens_are_those_of_the_text(vocabularies, name, text):
    vocabulary = vocabularies(name)
    ids, sizes = vocabulary.encoder.encode([text])[0]
    assert b"".join(vocabulary.pieces_V[token] for token in ids) == text.replace("▁", " ").encode()
    assert int(sizes.sum()) == len(text.encode())


@pytest.mark.parametrize("name", ["few", "many", "sentence"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_teacher_with_the_same_tokens_says_the_same(vocabularies, name, temperature):
    source, _ = across(name, name, vocabularies, top_k=20, temperature=temperature)
    batch = batch_of(vocabularies(name), TEXTS[:2])
    found, own = source.targets(batch).top_k, Teacher(vocabularies(name), 20, temperature).targets(batch).top_k
    torch.testing.assert_close(dense(found), dense(own), rtol=1e-5, atol=1e-9)
    measured = source.alignment(batch)
    assert measured.same == measured.aligned == measured.labels == batch.rows
    assert measured.exact_share == pytest.approx(1.0)


def twin(teacher: Vocabulary, student: Vocabulary, pair: VocabularyMap, batch: MicroBatch) -> list[dict[int, float]]:
    """The same targets a row at a time, from the definition, for documents that are whole."""
    out = []
    ids, places = batch.input_ids_BS[0].tolist(), batch.position_ids_BS[0].tolist()
    retold = retell(
        pair, *(tensor.numpy() for tensor in (batch.input_ids_BS, batch.position_ids_BS, batch.rows_N, batch.labels_N))
    )
    told, told_places = retold.ids_BP[0].tolist(), retold.positions_BP[0].tolist()
    starts = [number for number, place in enumerate(told_places) if place == 0]
    p_PV = random_logits(retold.ids_BP, np.arange(len(told)), teacher.size).softmax(1)
    for row, label in zip(batch.rows_N.tolist(), batch.labels_N.tolist(), strict=True):
        begin, document = row - places[row], places[: row + 1].count(0) - 1
        before = [token for token in ids[begin : row + 1] if token not in (*student.prefix, student.end)]
        s = len(b"".join(student.pieces_V[token] for token in before))
        whole, at, position = b"", 0, starts[document] + len(teacher.prefix)
        while position < len(told) and told[position] != teacher.end:
            piece = teacher.pieces_V[told[position]]
            if at + len(piece) > s:
                break
            at, position = at + len(piece), position + 1
        rest = told[position : told.index(teacher.end, position) + 1]
        whole = b"".join(teacher.pieces_V[token] for token in rest if token != teacher.end)
        if position == starts[document]:
            out.append({})
            continue
        gone, p_V = whole[: s - at], p_PV[position - 1].tolist()
        possible = {t: p for t, p in enumerate(p_V) if not gone or (teacher.pieces_V[t] or b"").startswith(gone)}
        total = sum(possible.values())
        if gone and not total > 1 - sum(p_V):
            out.append({})
            continue
        found: dict[int, float] = {}
        for token, p in possible.items():
            remains, moved = teacher.pieces_V[token][len(gone) :], 0.0
            goes_to = student.end if token == teacher.end else student.ids.get(remains, -1)
            if goes_to < 0 and remains:
                goes_to = student.begins([remains])[0]
            size = len(student.pieces_V[label]) if label != student.end else 0
            if token == rest[0] and len(remains) >= size:
                goes_to = label
            elif token == rest[0]:
                product, end, reach = p, len(gone) + size, len(teacher.pieces_V[token])
                for number, following in enumerate(rest[1:], 1):
                    if reach >= end or following == teacher.end:
                        break
                    piece, after = teacher.pieces_V[following], p_PV[position - 1 + number].tolist()
                    needed = whole[reach:end]
                    beginning = [q for t, q in enumerate(after) if teacher.pieces_V[t].startswith(needed)]
                    product *= after[following] if len(piece) <= end - reach else sum(beginning)
                    reach += len(piece)
                found[label] = found.get(label, 0.0) + product / total
                moved = product
            if goes_to >= 0:
                found[goes_to] = found.get(goes_to, 0.0) + (p - moved) / total
        out.append(found)
    return out


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_targets_are_those_of_the_definition(vocabularies, teacher, student):
    source, pair = across(teacher, student, vocabularies)
    batch = batch_of(vocabularies(student), TEXTS[:2])
    expected = twin(vocabularies(teacher), vocabularies(student), pair, batch)
    found_NV = dense(source.targets(batch).top_k)
    assert (found_NV.sum(1) < 1 + 1e-5).all()
    silent = 0
    for row, wanted in enumerate(expected):
        if not wanted:
            silent += 1
            assert found_NV[row].sum() < 1e-25
            continue
        row_V = torch.zeros(found_NV.shape[1], dtype=torch.float64)
        for token, p in wanted.items():
            row_V[token] = p
        torch.testing.assert_close(found_NV[row], row_V, rtol=1e-4, atol=1e-8)
    # a document's first token, of which a teacher without one of its own before it says nothing
    assert silent <= 8 if not vocabularies(teacher).prefix else silent == 0


def test_a_token_of_two_of_the_teachers_has_the_product_of_their_probabilities(vocabularies):
    few, many = vocabularies("few"), vocabularies("many")
    source, _ = across("few", "many", vocabularies)
    batch = batch_of(many, ["the river ran past"])
    found_NV = dense(source.targets(batch).top_k)
    label = batch.labels_N.tolist().index(many.ids[b" river"])
    retold = few.encoder.encode(["the river ran past"])[0].ids.tolist()
    pieces = [few.pieces_V[token] for token in retold]
    first = next(n for n in range(len(pieces)) if b"".join(pieces[:n]) == b"the")
    behind = next(n for n in range(len(pieces)) if b"".join(pieces[:n]) == b"the river")
    assert behind > first + 1
    p_MV = random_logits(np.asarray([retold]), np.arange(len(retold)), few.size).softmax(1)
    product = math.prod(float(p_MV[n - 1, retold[n]]) for n in range(first, behind))
    assert float(found_NV[label, many.ids[b" river"]]) == pytest.approx(product, rel=1e-3)


def test_a_window_may_begin_and_end_within_a_character(vocabularies):
    """And the teacher reads whole ones; rows before them have no targets."""
    source, _ = across("sentence", "few", vocabularies)
    text = "🙂 the river 東"
    batch = batch_of(vocabularies("few"), [text], slice(2, -2))
    targets = source.targets(batch).top_k
    assert targets.logits_NK.isfinite().any(1).all()
    found = dense(targets).sum(1)
    assert found[0] < 1e-25 and found[3] > 0.5
    retold = retell(
        VocabularyMap(vocabularies("sentence"), vocabularies("few")),
        *(t.numpy() for t in (batch.input_ids_BS, batch.position_ids_BS, batch.rows_N, batch.labels_N)),
    )
    assert vocabularies("sentence").encoder.text_of(retold.ids_BP[0][1:].tolist()) == " the river "


def test_rows_of_several_sequences_and_what_was_begun_ahead(vocabularies):
    source, _ = across("sentence", "many", vocabularies, top_k=30)
    one, two = (batch_of(vocabularies("many"), [text]) for text in ("the old mill and", "the old mill by name"))
    width = min(one.input_ids_BS.shape[1], two.input_ids_BS.shape[1])
    both = MicroBatch(
        torch.cat([b.input_ids_BS[:, :width] for b in (one, two)]), torch.arange(width).expand(2, width),
        torch.cat([b.rows_N[: width - 1] + n * width for n, b in enumerate((one, two))]),
        torch.cat([b.labels_N[: width - 1] for b in (one, two)]), (("train", 1), ("train", 2)),
    )  # fmt: skip
    plain = source.targets(both).top_k
    source.prefetch(both)
    source.prefetch(both)
    ahead = source.targets(both).top_k
    torch.testing.assert_close(dense(ahead), dense(plain))
    source.prefetch(both)  # and then only some of the rows are asked for
    some = source.targets(both.part(torch.tensor([1, 4]))).top_k
    torch.testing.assert_close(dense(some), dense(plain)[[1, 4]])
    source.close()
    assert source._source.closed


def test_the_rest_of_other_tokens_goes_to_none_where_that_is_asked(vocabularies):
    pair = VocabularyMap(vocabularies("many"), vocabularies("few"), project=False)
    source = AcrossTokenizers(Teacher(vocabularies("many")), pair, Needs(top_k=64))
    batch = batch_of(vocabularies("few"), TEXTS[:1])
    measured = source.alignment(batch)
    assert measured.projected == 0.0 and 0.5 < measured.exact_share < 1.0
    assert dense(source.targets(batch).top_k).sum(1).mean() < 0.95
    assert "of its probability is on tokens that the student has" in measured.in_words()


def test_a_document_ends_for_the_teacher_at_a_token_that_its_model_does_not_know(vocabularies):
    many, few = vocabularies("many"), vocabularies("few")
    unknown = many.encoder.encode(["the river ran"])[0].ids.max()
    batch = batch_of(few, ["the river ran past"])
    told = retell(
        VocabularyMap(many, few, teacher_rows=int(unknown)),
        *(t.numpy() for t in (batch.input_ids_BS, batch.position_ids_BS, batch.rows_N, batch.labels_N)),
    )
    assert (told.ids_BP < unknown).all()
    text = many.encoder.text_of(told.ids_BP[0].tolist())
    assert text and "the river ran past".startswith(text) and len(text) < len("the river ran")


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_what_has_no_match_is_all_that_the_matched_entries_lack(vocabularies, teacher, student):
    """Of rows that the teacher speaks of: sorted, and together with the targets the whole distribution."""
    pair = VocabularyMap(vocabularies(teacher), vocabularies(student), project=False)
    source = AcrossTokenizers(Teacher(vocabularies(teacher)), pair, Needs(top_k=64, unmatched=True))
    batch = batch_of(vocabularies(student), TEXTS[:2])
    targets = source.targets(batch)
    rest, found_N = targets.unmatched, dense(targets.top_k).sum(1)
    told = rest.told_N
    assert (rest.p_NK.sum(1)[told] + found_N[told]).numpy() == pytest.approx(1.0, abs=1e-5)
    assert (rest.p_NK.diff(dim=1) <= 0).all()
    silent = rest.p_NK.sum(1)[~told]
    assert ((silent == 0) | ((silent - 1).abs() < 1e-5)).all(), "all of the teacher's, or nothing before it began"
    common = {piece for piece in pair.student.pieces_V if piece} & {piece for piece in pair.teacher.pieces_V if piece}
    for token, piece in enumerate(pair.student.pieces_V):
        lacking = bool(piece) and piece not in common and token != pair.student.end
        assert bool(rest.lacking_V[token]) == lacking, piece
    half = targets.part(torch.arange(batch.rows)[::2])
    torch.testing.assert_close(half.unmatched.p_NK, rest.p_NK[::2])
    assert AcrossTokenizers(Teacher(vocabularies(teacher)), pair, Needs(top_k=64)).targets(batch).unmatched is None
