"""What an evaluation needs to know about each token, computed from final hidden states a few rows at a time.

Letters: N scored tokens, C tokens of one chunk, H hidden size of a model, V vocabulary.
No N×V tensor is ever made: a chunk of C rows of logits is turned into six numbers per token and freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdscale.errors import CheckpointError
from kdscale.models.head import OutputHead, encoder_parts, final_hidden, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 32 << 20  # of one fp32 logits chunk; about six such buffers are alive at once


@dataclass(frozen=True)
class TokenStats:
    """One value per scored token, on the CPU. The last three compare with the teacher; None for the teacher itself."""

    ce_N: Tensor  # nats, −log q(label)
    confidence_N: Tensor  # probability of the most likely token
    correct_N: Tensor  # bool: the most likely token is the label
    kl_N: Tensor | None = None  # nats, KL(teacher ‖ student) over the whole vocabulary
    agrees_N: Tensor | None = None  # bool: same most likely token as the teacher
    overlap_N: Tensor | None = None  # Σ_v min(p_v, q_v), from 0 to 1: how likely the teacher accepts a token drawn here

    @staticmethod
    def concatenate(chunks: Sequence[TokenStats]) -> TokenStats:
        """The statistics of all tokens of `chunks`, in their order."""

        def joined(name: str) -> Tensor | None:
            values = [getattr(chunk, name) for chunk in chunks]
            return None if not values or values[0] is None else torch.cat(values)

        return TokenStats(**{name: joined(name) for name in _FIELDS})  # type: ignore[arg-type]

    def as_columns(self, compared: bool) -> Tensor:
        """All values as fp32, one row a token, for other ranks; `compared`: with those that compare two models."""
        return torch.stack([getattr(self, name).float() for name in _FIELDS[: _columns(compared)]], dim=-1)

    @staticmethod
    def no_columns(compared: bool) -> Tensor:
        """What `as_columns` gives of no token."""
        return torch.empty(0, _columns(compared))

    @staticmethod
    def from_columns(columns: Tensor) -> TokenStats:
        """The statistics from which `as_columns` made the columns."""
        values = dict(zip(_FIELDS, columns.unbind(-1), strict=False))
        return TokenStats(**{name: value.bool() if name in _BOOLS else value for name, value in values.items()})


_BOOLS = ("correct_N", "agrees_N")
_FIELDS = ("ce_N", "confidence_N", "correct_N", "kl_N", "agrees_N", "overlap_N")


def _columns(compared: bool) -> int:
    return len(_FIELDS) if compared else 3


def checked_head(model: PreTrainedModel, name: str) -> OutputHead:
    """The model's output head. Raises CheckpointError when a trial shows that it does more than `OutputHead` says."""
    head = head_of(model)
    _check_head(model, head, name)
    return head


def token_stats(
    teacher: OutputHead,
    teacher_hidden_NH: Tensor,
    students: Sequence[tuple[OutputHead, Tensor]],
    labels_N: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[TokenStats, list[TokenStats]]:
    """Score the teacher and every student (its head and its own hidden states [N, H]) on the same N labels."""
    rows = max(1, chunk_bytes // (4 * teacher.vocab))
    of_teacher: list[TokenStats] = []
    of_students: list[list[TokenStats]] = [[] for _ in students]
    for start in range(0, len(labels_N), rows):
        chunk = slice(start, start + rows)
        label_C1 = labels_N[chunk, None]
        teacher_CV = torch.log_softmax(teacher.logits(teacher_hidden_NH[chunk]), dim=-1)
        of_teacher.append(_stats(teacher_CV, label_C1, None))
        for (head, hidden_NH), collected in zip(students, of_students, strict=True):
            student_CV = torch.log_softmax(head.logits(hidden_NH[chunk]), dim=-1)
            collected.append(_stats(student_CV, label_C1, teacher_CV))
    return TokenStats.concatenate(of_teacher), [TokenStats.concatenate(chunks) for chunks in of_students]


def of_same_tokens(heads: Mapping[str, OutputHead], tokens: Callable[[], int]) -> list[OutputHead]:
    """The heads with as many rows each: those of the smallest, where the others' more are padding.

    `tokens`: how many the tokenizer has. Raises CheckpointError for a head with fewer rows than that while they differ:
    KL and agreement would mean nothing.
    """
    sizes = {name: head.vocab for name, head in heads.items()}
    fewest = min(sizes.values())
    if len(set(sizes.values())) > 1 and fewest < tokens():
        raise CheckpointError(
            "the models to compare differ in vocabulary", expected="one size, or the tokenizer's and padding",
            got=str(sizes),
        )  # fmt: skip
    return [head if head.vocab == fewest else head.first_rows(fewest) for head in heads.values()]


def _stats(logprob_CV: Tensor, label_C1: Tensor, teacher_CV: Tensor | None) -> TokenStats:
    best_C, choice_C = logprob_CV.max(dim=-1)
    kl_C = agrees_C = overlap_C = None
    if teacher_CV is not None:
        # p·(log p − log q) with p = 0 must give 0, also where a head puts −inf on a token.
        gap_CV = torch.where(teacher_CV == -torch.inf, 0.0, teacher_CV - logprob_CV)
        p_CV = teacher_CV.exp()
        kl_C = (p_CV * gap_CV).sum(dim=-1).cpu()
        agrees_C = (teacher_CV.argmax(dim=-1) == choice_C).cpu()
        overlap_C = torch.minimum(p_CV, logprob_CV.exp()).sum(dim=-1).clamp(max=1.0).cpu()
    return TokenStats(
        ce_N=-logprob_CV.gather(-1, label_C1).squeeze(-1).cpu(),
        confidence_N=best_C.exp().clamp(max=1.0).cpu(),
        correct_N=(choice_C == label_C1.squeeze(-1)).cpu(),
        kl_N=kl_C,
        agrees_N=agrees_C,
        overlap_N=overlap_C,
    )


@torch.inference_mode()
def _check_head(model: PreTrainedModel, head: OutputHead, name: str) -> None:
    ids_BS = torch.arange(8, device=model.device)[None] % head.vocab
    own: dict[str, Any] = {"use_cache": False}
    if (encoder := encoder_parts(model)) is not None:  # one that takes some id for padding would skip a position
        own = {"position_ids": torch.arange(8, device=model.device)[None] + encoder.first_position}
    expected_SV = model(input_ids=ids_BS, **own).logits[0].float()
    got_SV = head.logits(final_hidden(model, ids_BS)[0])
    if expected_SV.dim() == 1:  # of classes, which a whole text has
        got_SV = got_SV[0]
    if not bool(torch.isfinite(expected_SV).all()):
        return  # broken weights are reported by what they score, with a count
    tolerance = 1e-3 if head.weight_VH.dtype == torch.float32 else 5e-2
    if not torch.allclose(got_SV, expected_SV, rtol=tolerance, atol=tolerance * float(expected_SV.abs().max())):
        raise CheckpointError(
            f"{name}: the output head of {type(model).__name__} does more than a linear layer, a scale and a soft cap",
            got=f"logits off by {float((got_SV - expected_SV).abs().max()):.3g}",
            hint="this family cannot be evaluated by kdscale yet",
        )
