"""linear_full_kl: exact KL over the whole vocabulary from two hidden states and two heads; for evaluation.

Legend: N rows, M valid rows, C rows of one chunk, H student's and G teacher's hidden size, V vocabulary, T temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels import checks
from kdscale_kernels.dispatch import choose_backend
from kdscale_kernels.products import Head, chunk_bytes_for, compute_dtypes, row_chunks
from kdscale_kernels.rows import cap_
from kdscale_kernels.types import Backend, FullKL, LossOptions


@torch.no_grad()
def linear_full_kl(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    *,
    valid_N: Tensor,
    labels_N: Tensor | None = None,
    temperature: float = 1.0,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: Backend = "auto",
) -> FullKL:
    """Sum over valid rows of T²·KL(teacher ‖ student), top-1 agreement and, given labels, both cross-entropies.

    valid_N [N] bool marks the rows that count; labels_N [N] holds ids there and anything elsewhere. Heads of
    different (padded) sizes need vocab_size. Two chunks of logits exist at a time, together within chunk_bytes
    (None: 64 MiB on a CPU, 1 GiB on CUDA).
    No gradients. Raises ValueError for arguments that do not fit together.
    """
    choose_backend(backend, student_hidden_NH.device, cannot="linear_full_kl has no Triton form")
    checks.check_linear(student_hidden_NH, student_weight_VH, student_bias_V, "student_")
    checks.check_linear(teacher_hidden_NG, teacher_weight_VG, teacher_bias_V, "teacher_")
    vocab = _shared_vocab(vocab_size, student_weight_VH.shape[0], teacher_weight_VG.shape[0])
    rows = student_hidden_NH.shape[0]
    if teacher_hidden_NG.shape[0] != rows or valid_N.shape != (rows,) or valid_N.dtype != torch.bool:
        raise ValueError(
            f"expected teacher_hidden [{rows}, G] and valid_N bool [{rows}], got "
            f"{list(teacher_hidden_NG.shape)} and {valid_N.dtype} {list(valid_N.shape)}"
        )
    if labels_N is not None and labels_N.shape != (rows,):
        raise ValueError(f"labels_N: expected [{rows}], got {list(labels_N.shape)}")
    sides = [
        _Side(student_hidden_NH, student_weight_VH, student_bias_V, student_softcap, vocab),
        _Side(teacher_hidden_NG, teacher_weight_VG, teacher_bias_V, teacher_softcap, vocab),
    ]
    LossOptions(temperature=temperature)
    valid_M = valid_N.nonzero()[:, 0]
    sums_R4 = sides[0].buffer(0).new_zeros(valid_M.numel(), 4)
    chunk_bytes = chunk_bytes_for(chunk_bytes, student_hidden_NH.device)
    chunks = row_chunks(valid_M.numel(), vocab, chunk_bytes, buffers=4 if student_softcap or teacher_softcap else 3)
    with torch.autocast(student_hidden_NH.device.type, enabled=False):
        buffers = [side.buffer(chunks[0].stop if chunks else 0) for side in sides]
        for chunk in chunks:
            rows_C = valid_M[chunk]
            student_CV, teacher_CV = (
                side.logits(rows_C, buffer[: rows_C.numel()]) for side, buffer in zip(sides, buffers, strict=True)
            )
            labels_C = None if labels_N is None else labels_N[rows_C].long()
            sums_R4[chunk] = _chunk_sums(student_CV, teacher_CV, labels_C, temperature)
    kl, agree, ce, teacher_ce = sums_R4.sum(0).unbind()
    tokens = torch.full((), valid_M.numel(), dtype=torch.int64, device=valid_N.device)
    return FullKL(kl, tokens, agree, ce, teacher_ce)


class _Side:
    """One model's hidden states and head."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias_V: Tensor | None, softcap: float | None, vocab: int):
        LossOptions(softcap=softcap)
        operand, self.accumulate = compute_dtypes(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            self.head = Head(weight, bias_V, operand, self.accumulate, vocab)
        self.hidden, self.softcap, self.vocab = hidden, softcap, vocab

    def buffer(self, rows: int) -> Tensor:
        return torch.empty(rows, self.vocab, dtype=self.accumulate, device=self.hidden.device)

    def logits(self, rows_C: Tensor, out_CV: Tensor) -> Tensor:
        z_CV = self.head.logits(self.head.cast(self.hidden[rows_C]), out_CV)
        if self.softcap is not None:
            cap_(z_CV, self.softcap)
        return z_CV


def _chunk_sums(student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor | None, temperature: float) -> Tensor:
    """[C,4]: T²·KL, agreement, student's CE, teacher's CE. Destroys both chunks."""
    out_C4 = student_CV.new_zeros(student_CV.shape[0], 4)
    out_C4[:, 1] = student_CV.argmax(1) == teacher_CV.argmax(1)
    for column, z_CV in ((2, student_CV), (3, teacher_CV)):
        if labels_C is not None:
            out_C4[:, column] = _lse(z_CV) - z_CV.gather(1, labels_C[:, None])[:, 0]
        z_CV.div_(temperature)
        z_CV.sub_(_lse(z_CV)[:, None])
    torch.sub(teacher_CV, student_CV, out=student_CV)  # log p - log q
    p_CV = teacher_CV.exp_()
    student_CV.masked_fill_(p_CV == 0.0, 0.0)  # 0·log 0 contributes nothing; NaN is not equal to 0 and stays
    out_C4[:, 0] = temperature**2 * student_CV.mul_(p_CV).sum(1)
    return out_C4


def _lse(z_CV: Tensor) -> Tensor:
    """logsumexp by rows. torch.logsumexp measured three times slower on a CPU than these plain steps."""
    top_C1 = z_CV.amax(1, keepdim=True)
    return (top_C1 + (z_CV - top_C1).exp_().sum(1, keepdim=True).log())[:, 0]


def _shared_vocab(vocab_size: int | None, student: int, teacher: int) -> int:
    if vocab_size is None and student != teacher:
        raise ValueError(
            f"vocab_size: the heads have {student} (student) and {teacher} (teacher) rows; "
            "name the number of real entries both share"
        )
    return checks.resolve_vocab(vocab_size, min(student, teacher), "the smaller head")
