"""What a teacher says about a position, whoever the teacher is: its top K entries and the mass of all the rest.

N rows (valid positions), K entries, G teacher's hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdscale.errors import CheckpointError
from kdscale.models.head import OutputHead


@dataclass(frozen=True)
class TopKTargets:
    """Sparse teacher targets for N rows.

    `ids_NK` (int64) are the K most likely tokens, `logits_NK` (fp32) their raw logits, `lse_N` (fp32) logsumexp(z / T)
    over the whole vocabulary, so that p_k = exp(z_k / T − lse) needs no renormalisation and the tail is 1 − Σ p_k.
    """

    ids_NK: torch.Tensor
    logits_NK: torch.Tensor
    lse_N: torch.Tensor
    temperature: float
    vocab_size: int

    @property
    def rows(self) -> int:
        return self.ids_NK.shape[0]

    def probe(self) -> torch.Tensor:
        """A number that is finite only if the targets are."""
        return self.lse_N.sum()


@dataclass(frozen=True)
class FullTargets:
    """All that a teacher says about N rows: what enters its head, [N,G], and the head itself, [V,G], by reference."""

    hidden_NG: torch.Tensor
    head: OutputHead

    def probe(self) -> torch.Tensor:
        """A number that is finite only if the targets are."""
        return self.hidden_NG.sum(dtype=torch.float32)


def shared_vocabulary(teacher_rows: int, student_rows: int, tokenizer_size: int, student_dir: str) -> int:
    """How many rows of both heads mean the same token: all of them, or the tokenizer's when only padding differs.

    Raises CheckpointError when a head has fewer rows than the tokenizer has tokens while the two heads differ.
    """
    if teacher_rows == student_rows:
        return teacher_rows
    if min(teacher_rows, student_rows) < tokenizer_size:
        raise CheckpointError(
            f"{student_dir}: vocabulary",
            expected=f"the teacher's {teacher_rows} rows; or the tokenizer's {tokenizer_size} and padding",
            got=f"{student_rows} rows",
            hint="distil a student that was pruned from this teacher",
        )
    return tokenizer_size
