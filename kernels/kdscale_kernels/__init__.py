"""Distillation losses without rows × vocabulary logits, for anybody's training loop. See docs/reference/kernels.md."""

from kdscale_kernels.backend import BackendUnavailableError, choose_backend
from kdscale_kernels.ops.linear_full_kl import linear_full_kl
from kdscale_kernels.ops.linear_sparse_kl import linear_sparse_kl
from kdscale_kernels.ops.linear_topk_lse import linear_topk_lse
from kdscale_kernels.ops.sparse_kl import sparse_kl
from kdscale_kernels.ops.vocab_parallel import vocab_parallel_sparse_kl, vocab_parallel_topk_lse
from kdscale_kernels.types import Backend, Divergence, FullKL, SparseKL, Tail, TopKLse

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "Divergence",
    "FullKL",
    "SparseKL",
    "Tail",
    "TopKLse",
    "choose_backend",
    "linear_full_kl",
    "linear_sparse_kl",
    "linear_topk_lse",
    "sparse_kl",
    "vocab_parallel_sparse_kl",
    "vocab_parallel_topk_lse",
]
