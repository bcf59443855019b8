"""Tokens drawn from a teacher's distribution: RS-KD (arXiv 2503.16870), with the teacher itself as the proposal.

A token that was drawn c times of D gets the weight c/D, whose expected value is its probability: a loss that is linear
in the weights, and its gradient, have the expected value that they have over the whole vocabulary. Every position has
random numbers of its own, a function of the seed and the sequence, so that draws do not depend on micro-batches, ranks,
or on whether they were stored.

N rows, C rows of a chunk, D draws, K slots (one more than draws), V vocabulary, S positions of a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from kdscale.models.head import OutputHead
from kdscale.teacher.targets import SampledTargets
from kdscale_kernels.fused.products import HeadProducts, chunk_bytes_for, compute_dtypes, row_chunks

EMPTY = -1  # the id of a slot that is not used


def uniforms_of(
    sequences: Sequence[tuple[str, int]], length: int, rows_N: torch.Tensor, draws: int, seed: int
) -> torch.Tensor:
    """Random numbers [N, D] in [0, 1) for flat positions `rows_N` of sequences (split and number) of `length` tokens.

    fp64, on the device of `rows_N`; the same on every device.
    """
    of_sequences = []
    for split, number in sequences:
        digest = hashlib.sha256(f"{seed}/{split}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        of_sequences.append(torch.rand(length, draws, generator=generator, dtype=torch.float64))
    return torch.cat(of_sequences).to(rows_N.device, non_blocking=True).index_select(0, rows_N)


def draw(
    hidden_NH: torch.Tensor, head: OutputHead, uniforms_ND: torch.Tensor, *, temperature: float, vocab_size: int
) -> SampledTargets:
    """As many draws as `uniforms_ND` has columns, from softmax(logits / temperature) of each row.

    Logits have fp32 sums, and the distribution is summed in fp64; both live a chunk of rows at a time.
    """
    operand, accumulate = compute_dtypes(hidden_NH, head.weight_VH)
    products = HeadProducts(head.weight_VH, head.bias_V, operand, accumulate, vocab_size)
    rows, draws = uniforms_ND.shape
    ids_NK = torch.full((rows, draws + 1), EMPTY, dtype=torch.int64, device=hidden_NH.device)
    weights_NK = torch.zeros(rows, draws + 1, dtype=torch.float32, device=hidden_NH.device)
    for chunk in row_chunks(rows, vocab_size, chunk_bytes_for(None, hidden_NH.device), buffers=6):
        hidden_CH = products.cast(hidden_NH[chunk])
        out_CV = hidden_CH.new_empty(len(hidden_CH), vocab_size, dtype=accumulate)
        logits_CV = head.capped(products.logits(hidden_CH, out_CV))
        top1_C1 = logits_CV.argmax(1, keepdim=True)
        cdf_CV = torch.softmax(logits_CV / temperature, 1).double().cumsum(1)
        points_CD = uniforms_ND[chunk] * cdf_CV[:, -1:]
        drawn_CD = torch.searchsorted(cdf_CV, points_CD, right=True).clamp(max=vocab_size - 1)
        ids_NK[chunk], weights_NK[chunk] = _counted(torch.cat([top1_C1, drawn_CD], 1))
    return SampledTargets(ids_NK, weights_NK, temperature, vocab_size)


def _counted(drawn_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(different ids, shares of the draws) of a first token, which counts for nothing, and draws.

    The first token stays first; the others follow by id, then empty slots.
    """
    is_first_CK = drawn_CK == drawn_CK[:, :1]
    keys_CK = drawn_CK.masked_fill(is_first_CK, EMPTY).sort(1).values  # the first token sorts before all others
    starts_CK = torch.ones_like(keys_CK, dtype=torch.bool)
    starts_CK[:, 1:] = keys_CK[:, 1:] != keys_CK[:, :-1]
    slots_CK = starts_CK.cumsum(1) - 1
    ids_CK = torch.full_like(drawn_CK, EMPTY).scatter(1, slots_CK, keys_CK)
    ids_CK[:, 0] = drawn_CK[:, 0]
    ones_CK = torch.ones(drawn_CK.shape, dtype=torch.float32, device=drawn_CK.device)
    counts_CK = torch.zeros_like(ones_CK).scatter_add(1, slots_CK, ones_CK)
    counts_CK[:, 0] -= 1.0  # the first token's own column
    return ids_CK, counts_CK / (drawn_CK.shape[1] - 1)
