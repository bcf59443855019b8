"""Distillation losses that never hold rows × vocabulary logits, for any training loop. See docs/reference/kernels.md.

The table of divergences is plain Python; torch is loaded by the first use of anything else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdscale_kernels.divergence import DIVERGENCES, Divergence

if TYPE_CHECKING:
    from kdscale_kernels.backend import BackendUnavailableError, choose_backend
    from kdscale_kernels.ops.linear_full_kl import linear_full_kl
    from kdscale_kernels.ops.linear_sparse_kl import linear_sparse_kl
    from kdscale_kernels.ops.linear_topk_lse import linear_topk_lse
    from kdscale_kernels.ops.sparse_kl import sparse_kl
    from kdscale_kernels.ops.vocab_parallel import vocab_parallel_sparse_kl, vocab_parallel_topk_lse
    from kdscale_kernels.types import Backend, FullKL, SparseKL, Tail, TopKLse

__all__ = [
    "DIVERGENCES",
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

_HOME = {
    **dict.fromkeys(("BackendUnavailableError", "choose_backend"), "backend"),
    **dict.fromkeys(("Backend", "FullKL", "SparseKL", "Tail", "TopKLse"), "types"),
    **dict.fromkeys(("vocab_parallel_sparse_kl", "vocab_parallel_topk_lse"), "ops.vocab_parallel"),
    **{op: f"ops.{op}" for op in ("linear_full_kl", "linear_sparse_kl", "linear_topk_lse", "sparse_kl")},
}


def __getattr__(name: str) -> Any:
    """Import a public name's module at first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value
