"""What the kernels here take, known without importing triton.

Legend: V vocabulary, K teacher entries kept per row.
"""

from __future__ import annotations

import torch

from kdscale_kernels.divergence import Divergence

# Columns per group in Triton: V/G group maxima and K·G candidates are searched instead of V logits.
GROUP = 64
# Entries per row, and candidates of one selection, that a program keeps in registers. 16384 candidates always spill.
MAX_ENTRIES = 4096
MAX_CANDIDATES = 8192
_FP64 = "the Triton kernels compute in fp32, and these tensors are fp64"


def full_limit(divergence: Divergence, accumulate: torch.dtype) -> str | None:
    """Why a full-vocabulary loss cannot run in Triton, or None."""
    if accumulate == torch.float64:
        return _FP64
    return None if divergence.info.has_triton else f"the divergence {divergence.name} is written in torch only"


def sparse_limit(divergence: Divergence, entries: int, accumulate: torch.dtype) -> str | None:
    """Why a sparse loss cannot run in Triton, or None."""
    if entries > MAX_ENTRIES and accumulate != torch.float64:
        return f"the Triton kernels take at most {MAX_ENTRIES} entries per row, and there are {entries}"
    return full_limit(divergence, accumulate)


def topk_limit(vocab: int, k: int, accumulate: torch.dtype) -> str | None:
    """Why a top-k cannot run in Triton, or None."""
    if accumulate == torch.float64:
        return _FP64
    groups = -(-vocab // GROUP)
    if vocab <= MAX_CANDIDATES or (groups <= MAX_CANDIDATES and k * GROUP <= MAX_CANDIDATES):
        return None
    return f"the Triton top-k takes k <= {MAX_CANDIDATES // GROUP} for this vocabulary, and k is {k} of {vocab}"
