"""What a source of targets says about the rows of a micro-batch.

N rows (valid positions), K entries, G teacher's hidden size, V vocabulary, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from kdscale.errors import CheckpointError
from kdscale.models.attention import AttentionRows
from kdscale.models.head import OutputHead


@dataclass(frozen=True)
class TopKTargets:
    """The K most likely tokens of N rows, in any order.

    `ids_NK` (int64) are the tokens, `logits_NK` (fp32) their raw logits, `lse_N` (fp32) logsumexp(z / T) over the whole
    vocabulary, so that p_k = exp(z_k / T − lse) needs no renormalisation and the tail is 1 − Σ p_k.
    """

    ids_NK: torch.Tensor
    logits_NK: torch.Tensor
    lse_N: torch.Tensor
    temperature: float
    vocab_size: int

    def first(self, count: int) -> TopKTargets:
        """The `count` most likely tokens alone; all of them when there are no more."""
        if self.ids_NK.shape[1] <= count:
            return self
        order_NK = self.logits_NK.sort(dim=1, descending=True, stable=True).indices[:, :count]
        ids_NK, logits_NK = (entries.gather(1, order_NK) for entries in (self.ids_NK, self.logits_NK))
        return TopKTargets(ids_NK, logits_NK, self.lse_N, self.temperature, self.vocab_size)


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from the teacher's distribution of each of N rows, with their importance weights.

    `ids_NK` (int64) are different tokens, −1 in slots that are empty; the first is the teacher's most likely token,
    drawn or not. `weights_NK` (fp32) is the share of the draws that chose it: its expected value is its probability.
    Source: RS-KD, arXiv 2503.16870, with the teacher's own distribution as the proposal.
    """

    ids_NK: torch.Tensor
    weights_NK: torch.Tensor
    temperature: float
    vocab_size: int

    def marks(self) -> torch.Tensor:
        """Stand-ins for logits [N,K], as the losses read them: −inf in empty slots, the largest for the first token."""
        marks_NK = torch.zeros_like(self.weights_NK).masked_fill(self.ids_NK < 0, float("-inf"))
        marks_NK[:, 0] = 1.0
        return marks_NK


@dataclass(frozen=True)
class FullTargets:
    """The distribution over the whole vocabulary: what enters the teacher's head, [N,G], and the head, by reference."""

    hidden_NG: torch.Tensor
    head: OutputHead


@dataclass(frozen=True)
class LabelTargets:
    """The teacher's log-probability (fp32), at temperature 1, of each of N rows' own label."""

    logprobs_N: torch.Tensor


@dataclass(frozen=True)
class UnmatchedTargets:
    """What a teacher with another tokenizer says of tokens that the student lacks, at N rows.

    `p_NK` (fp32) are their probabilities, the largest first and zeros behind, of those in its top K. `told_N` (bool):
    rows that the teacher's tokens are aligned with. Elsewhere `p_NK` are all of its top K where it last spoke, and none
    where it did not. `lacking_V` (bool): the student's tokens that the teacher lacks.
    """

    p_NK: torch.Tensor
    told_N: torch.Tensor
    lacking_V: torch.Tensor
    temperature: float

    def part(self, rows: slice | torch.Tensor) -> UnmatchedTargets:
        """Those of some of the rows: a slice, or numbers on the CPU."""
        return replace(self, p_NK=rows_of(self.p_NK, rows), told_N=rows_of(self.told_N, rows))


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The parts of the targets of `rows` rows that were asked for; what was not is None or empty.

    `hidden_NG` has the hidden states of the rows after a teacher's layer (EMBEDDINGS: those that enter layer 0),
    `attention` what the attention of a layer reads of all positions, by layer. `reference` is no teacher's: what the
    student gave the labels as it began. With several `teachers` there are no other parts.
    """

    rows: int
    top_k: TopKTargets | None = None
    sampled: SampledTargets | None = None
    full: FullTargets | None = None
    label: LabelTargets | None = None
    unmatched: UnmatchedTargets | None = None
    hidden_NG: Mapping[int, torch.Tensor] = field(default_factory=dict)
    attention: Mapping[int, AttentionRows] = field(default_factory=dict)
    reference: LabelTargets | None = None
    teachers: tuple[TeacherPart, ...] = ()

    def part(self, rows: slice | torch.Tensor) -> Targets:
        """The targets of some of the rows, a slice or numbers on the CPU, ascending; without those of layers."""
        if self.teachers:
            assert isinstance(rows, torch.Tensor)
            parts = tuple(part for whole in self.teachers if (part := whole.of(rows, self.rows)) is not None)
            return Targets(rows=len(rows), teachers=parts)
        return Targets(
            rows=len(range(self.rows)[rows]) if isinstance(rows, slice) else len(rows),
            reference=self.reference and _of_rows(self.reference, rows),
            top_k=self.top_k and _of_rows(self.top_k, rows),
            sampled=self.sampled and _of_rows(self.sampled, rows),
            full=self.full and _of_rows(self.full, rows),
            label=self.label and _of_rows(self.label, rows),
            unmatched=self.unmatched and self.unmatched.part(rows),
        )

    def probe(self) -> torch.Tensor:
        """A scalar (fp32) that is finite only if every part of the targets is."""
        parts = [self.top_k.lse_N] if self.top_k is not None else []
        parts += [self.sampled.weights_NK] if self.sampled is not None else []
        parts += [self.full.hidden_NG] if self.full is not None else []
        parts += [self.label.logprobs_N] if self.label is not None else []
        parts += [self.unmatched.p_NK] if self.unmatched is not None else []
        parts += self.hidden_NG.values()
        parts += [self.reference.logprobs_N] if self.reference is not None else []
        parts += [part for rows in self.attention.values() for part in (rows.query_TAD, rows.key_TGD, rows.value_TGD)]
        sums = [part.sum(dtype=torch.float32) for part in parts] + [part.targets.probe() for part in self.teachers]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum() if sums else torch.zeros(())


@dataclass(frozen=True)
class TeacherPart:
    """What one of several teachers says of some rows (their numbers, on the CPU; None: all), and its share in them."""

    share: float
    rows_M: torch.Tensor | None
    targets: Targets

    def of(self, chosen: torch.Tensor, rows: int) -> TeacherPart | None:
        """What it says of the `chosen` ones of `rows` rows, which become the rows; None where it says nothing."""
        own_M = torch.arange(rows) if self.rows_M is None else self.rows_M
        kept = torch.isin(own_M, chosen).nonzero().squeeze(1)
        if not len(kept):
            return None
        return TeacherPart(self.share, torch.searchsorted(chosen, own_M[kept]), self.targets.part(kept))


def rows_of(tensor: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor on any device: a slice, or numbers on the CPU; without waiting for the device."""
    if isinstance(rows, slice):
        return tensor[rows]
    return tensor.index_select(0, rows.to(tensor.device, non_blocking=True))


SomeTargets = TypeVar("SomeTargets", TopKTargets, SampledTargets, FullTargets, LabelTargets)


def _of_rows(targets: SomeTargets, rows: slice | torch.Tensor) -> SomeTargets:
    """Those of some of the rows; all of its tensors have a row for each."""
    of_rows: dict[str, Any] = {
        name: rows_of(value, rows) for name, value in vars(targets).items() if isinstance(value, torch.Tensor)
    }
    return replace(targets, **of_rows)


def shared_vocabulary(teacher_rows: int | None, student_rows: int, tokenizer_size: int, student_dir: str) -> int:
    """How many rows of both heads mean the same token: all of them, or the tokenizer's when only padding differs.

    Without a teacher (None) all rows of the student's count.
    Raises CheckpointError when a head has fewer rows than the tokenizer has tokens while the two heads differ.
    """
    if teacher_rows is None or teacher_rows == student_rows:
        return student_rows
    if min(teacher_rows, student_rows) < tokenizer_size:
        raise CheckpointError(
            f"{student_dir}: vocabulary",
            expected=f"the teacher's {teacher_rows} rows; or the tokenizer's {tokenizer_size} and padding",
            got=f"{student_rows} rows",
            hint="distil a student that was pruned from this teacher",
        )
    return tokenizer_size
