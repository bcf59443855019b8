"""The teacher's top K in the student's tokens: sparse targets like any others, and how much of them is exact.

Of the teacher's distribution at the last of its tokens that begins before or at s, given the text up to s:

- an entry that is one of the student's tokens goes there with its probability; any other to the token that it begins
  with (models/tokenizer/token_bytes.py);
- after s lies within a token of the teacher's, only entries that go on as the text did count, and their probabilities
  are divided by those of all that do;
- the text's own token is known to the end: where it is several tokens of the student's, its probability goes to the
  first of them in the text, and where the student's token is several of the teacher's, their product (the chain rule,
  each conditioned on the ones before it) moves to it from what the first of them begins with.

So over the rows of a piece of text on which both agree where it begins and ends, the product of the student's targets
for the text is the teacher's probability of it.

M the teacher's rows, N the student's, K entries, C factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch

from kdscale.models.tokenizer.token_bytes import VocabularyMap
from kdscale.teacher.targets import TopKTargets, UnmatchedTargets
from kdscale.teacher.vocabulary.alignment import Retold
from kdscale_kernels.rows.teacher_entries import sum_repeats

# A row that the teacher says nothing of has one entry of almost no mass: its divergence, all in the tail, is zero.
_NO_MASS = -69.0


@dataclass(frozen=True)
class Alignment:
    """Counts of the student's labels, and sums of the teacher's probability over the rows where it speaks.

    `same`: labels that are one token in both, where tokens of both begin; `aligned`: where tokens of both begin;
    `within`: the teacher's begins before; the other labels have no targets. `mass` is all of the probability of the
    top K, `exact` and `projected` what the student has a token for, and a beginning.
    """

    labels: int = 0
    same: int = 0
    aligned: int = 0
    within: int = 0
    mass: float = 0.0
    exact: float = 0.0
    projected: float = 0.0

    def __add__(self, other: Alignment) -> Alignment:
        """Both together."""
        return Alignment(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def same_share(self) -> float:
        """Of the labels."""
        return self.same / max(self.labels, 1)

    @property
    def exact_share(self) -> float:
        """Of the teacher's probability."""
        return self.exact / max(self.mass, 1e-9)

    def in_words(self) -> str:
        """For the log and the report."""
        labels, mass = max(self.labels, 1), max(self.mass, 1e-9)
        silent = 1 - (self.aligned + self.within) / labels
        return (
            f"{self.same_share:.1%} of {self.labels:,} held-out tokens are one token in both, "
            f"{self.aligned / labels:.1%} begin where the teacher's do, {self.within / labels:.1%} within one, "
            f"at {silent:.1%} it says nothing; {self.exact_share:.1%} of its probability is on tokens that the student "
            f"has, {self.projected / mass:.1%} on others that begin with one"
        )


@dataclass(frozen=True)
class _Placed:
    """The teacher's entries at the student's rows: `student_NK` (−1: none of the student's) with `p_NK` each, the
    products `moved_N` of the text's own token, and the rows of which the teacher speaks."""

    student_NK: torch.Tensor
    p_NK: torch.Tensor
    moved_N: torch.Tensor
    speaks_N: torch.Tensor


def mapped(targets: TopKTargets, retold: Retold, vocabularies: VocabularyMap, labels_N: torch.Tensor) -> TopKTargets:
    """Targets over the student's vocabulary for its rows, from those of the teacher's rows; `labels_N` are the text's.

    Each row has at most K + 1 entries; probabilities of tokens that have one begin are added up.
    """
    placed = _placed(targets, retold, vocabularies, labels_N)
    place_N = torch.from_numpy(retold.rows["place"]).to(labels_N.device)
    ids = torch.cat([placed.student_NK, labels_N[:, None]], 1)
    p = torch.cat([placed.p_NK, placed.moved_N[:, None]], 1).masked_fill(~placed.speaks_N[:, None], 0.0)
    lse_N = _probabilities(targets).sum(1).index_select(0, place_N.clamp_min(0)) * 0.0
    return _joined(ids, p, lse_N, labels_N, targets.temperature, vocabularies.student.size)


def unmatched(
    targets: TopKTargets, retold: Retold, vocabularies: VocabularyMap, labels_N: torch.Tensor
) -> UnmatchedTargets:
    """What `mapped` leaves to the tail of the same rows: sorted probabilities of tokens that the student lacks."""
    placed = _placed(targets, retold, vocabularies, labels_N)
    place_N = torch.from_numpy(retold.rows["place"]).to(labels_N.device)
    whole_NK = _probabilities(targets).index_select(0, place_N.clamp_min(0)) * (place_N >= 0)[:, None]
    lacking_NK = placed.p_NK.masked_fill(placed.student_NK >= 0, 0.0)
    p_NK = torch.where(placed.speaks_N[:, None], lacking_NK, whole_NK).sort(1, descending=True).values
    lacking_V = torch.from_numpy(vocabularies.lacking_V).to(labels_N.device)
    return UnmatchedTargets(p_NK, placed.speaks_N, lacking_V, targets.temperature)


def _probabilities(targets: TopKTargets) -> torch.Tensor:
    p_MK: torch.Tensor = (targets.logits_NK.float() / targets.temperature - targets.lse_N.float()[:, None]).exp()
    return p_MK


def _placed(targets: TopKTargets, retold: Retold, vocabularies: VocabularyMap, labels_N: torch.Tensor) -> _Placed:
    device = targets.ids_NK.device
    rows = {name: torch.from_numpy(column).to(device) for name, column in retold.rows.items()}
    p_MK = _probabilities(targets)
    ids_NK, p_NK = (entries.index_select(0, rows["place"].clamp_min(0)) for entries in (targets.ids_NK, p_MK))
    rank_V = torch.from_numpy(vocabularies.rank_V).to(device)
    student_NK = torch.from_numpy(vocabularies.student_V).to(device)[ids_NK]
    within_N = rows["skipped"] > 0
    ranks_NK = rank_V[ids_NK]
    goes_on_NK = (ranks_NK >= rows["first"][:, None]) & (ranks_NK < rows["behind"][:, None])
    possible_N = torch.where(within_N, (p_NK * goes_on_NK).sum(1), torch.ones_like(p_NK[:, 0]))
    unknown_N = (1.0 - p_NK.sum(1)).clamp_min(0.0)
    speaks_N = (rows["place"] >= 0) & (~within_N | (possible_N > unknown_N))
    student_NK = _rests(student_NK, ids_NK, goes_on_NK & within_N[:, None], rows["skipped"], vocabularies)
    p_NK = p_NK * (goes_on_NK | ~within_N[:, None]) / possible_N.clamp_min(1e-30)[:, None]
    is_true_NK = ids_NK == rows["true"][:, None]
    covered_N1 = rows["covered"].bool()[:, None]
    student_NK = torch.where(is_true_NK & covered_N1, labels_N[:, None], student_NK)
    moved_N = _products(retold.factors, targets.ids_NK, p_MK, rank_V, len(labels_N)) / possible_N.clamp_min(1e-30)
    moved_N = torch.minimum(moved_N, (p_NK * is_true_NK).sum(1))
    p_NK = torch.where(is_true_NK & ~covered_N1, p_NK - moved_N[:, None], p_NK)
    return _Placed(student_NK, p_NK, moved_N, speaks_N)


def _rests(
    student_NK: torch.Tensor, ids_NK: torch.Tensor, asked_NK: torch.Tensor, skipped_N: torch.Tensor,
    vocabularies: VocabularyMap,
) -> torch.Tensor:  # fmt: skip
    """`student_NK` with what follows the skipped bytes of a token where it is asked for; looked up on the host."""
    places = asked_NK.nonzero()
    if not len(places):
        return student_NK
    tokens, skipped = ids_NK[places[:, 0], places[:, 1]].tolist(), skipped_N[places[:, 0]].tolist()
    found = torch.tensor(vocabularies.after(zip(tokens, skipped, strict=True)), device=student_NK.device)
    out = student_NK.clone()
    out[places[:, 0], places[:, 1]] = found
    return out


def _products(
    factors: Mapping[str, np.ndarray], ids_MK: torch.Tensor, p_MK: torch.Tensor, rank_V: torch.Tensor, rows: int
) -> torch.Tensor:
    """The product of each row's factors [N], in their order; 0 of a row without any, or of one that the top K know
    nothing of."""
    out_N = torch.zeros(rows, device=p_MK.device)
    rows_R, begins_R, counts_R = np.unique(factors["row"], return_index=True, return_counts=True)
    if not len(rows_R):
        return out_N
    number_RF = begins_R[:, None] + np.arange(counts_R.max())
    there_RF = torch.from_numpy(number_RF < (begins_R + counts_R)[:, None]).to(p_MK.device)
    number_RF = np.minimum(number_RF, len(factors["row"]) - 1)
    place_RF, first_RF, behind_RF = (
        torch.from_numpy(factors[name][number_RF]).to(p_MK.device) for name in ("place", "first", "behind")
    )
    ranks_RFK = rank_V[ids_MK[place_RF]]
    inside_RFK = (ranks_RFK >= first_RF[..., None]) & (ranks_RFK < behind_RF[..., None])
    p_RF = torch.where(there_RF, (p_MK[place_RF] * inside_RFK).sum(-1), 1.0)
    out_N[torch.from_numpy(rows_R).to(p_MK.device)] = p_RF.prod(1)
    return out_N


def _joined(
    ids: torch.Tensor, p: torch.Tensor, lse_N: torch.Tensor, labels_N: torch.Tensor, temperature: float, vocab_size: int
) -> TopKTargets:
    """One entry for each id, with the sum of its probabilities; a row without any has the text's token, of no mass.

    `lse_N` is zero, or not finite where the teacher is not.
    """
    ids = ids.masked_fill((p <= 0.0) | (ids < 0), vocab_size)  # behind all others
    keys, order = torch.sort(ids, dim=1, stable=True)
    sums = sum_repeats(keys, p.gather(1, order).masked_fill(keys == vocab_size, 0.0))
    repeated = torch.zeros_like(keys, dtype=torch.bool)
    repeated[:, 1:] = keys[:, 1:] == keys[:, :-1]
    unused = repeated | (keys == vocab_size)
    logits = (sums.log() * temperature).masked_fill(unused, float("-inf"))
    none_N = unused.all(1)
    keys = keys.masked_fill(unused, 0)
    keys[:, 0] = torch.where(none_N, labels_N, keys[:, 0])
    logits[:, 0] = torch.where(none_N, torch.full_like(lse_N, _NO_MASS * temperature), logits[:, 0])
    return TopKTargets(keys, logits, lse_N, temperature, vocab_size)


def measured(targets: TopKTargets, retold: Retold, vocabularies: VocabularyMap, labels_N: torch.Tensor) -> Alignment:
    """How much of the teacher's top K, on these rows, has its match in the student's vocabulary."""
    device = targets.ids_NK.device
    place_N, skipped_N, true_N = (
        torch.from_numpy(retold.rows[name]).to(device) for name in ("place", "skipped", "true")
    )
    student_V, exact_V = (
        torch.from_numpy(array).to(device) for array in (vocabularies.student_V, vocabularies.exact_V)
    )
    begins_N = (place_N >= 0) & (skipped_N == 0)
    same_N = begins_N & (true_N >= 0) & exact_V[true_N.clamp_min(0)] & (student_V[true_N.clamp_min(0)] == labels_N)
    p_MK = _probabilities(targets)
    p_NK, ids_NK = (entries.index_select(0, place_N[begins_N]) for entries in (p_MK, targets.ids_NK))
    has_NK, exact_NK = student_V[ids_NK] >= 0, exact_V[ids_NK]
    speaks_N = mapped(targets, retold, vocabularies, labels_N).logits_NK[:, 0] > _NO_MASS * targets.temperature
    return Alignment(
        len(labels_N), int(same_N.sum()), int(begins_N.sum()), int((speaks_N & ~begins_N).sum()),
        float(p_NK.sum()), float((p_NK * exact_NK).sum()), float((p_NK * (has_NK & ~exact_NK)).sum()),
    )  # fmt: skip
