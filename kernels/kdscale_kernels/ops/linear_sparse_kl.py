"""linear_sparse_kl: distillation loss on K teacher entries a token, straight from the student's hidden states.

Legend: N rows, M valid rows, H hidden size, V vocabulary, K teacher entries, T temperature.

The gradients are made in the forward pass (made_in_forward.py) by one of two modes (modes.py): N×V never exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.backend import choose_backend
from kdscale_kernels.divergence import Divergence
from kdscale_kernels.fused.autograd import made_in_forward
from kdscale_kernels.fused.memory_plan import Problem, Shape, layout_for
from kdscale_kernels.fused.products import compute_dtypes, grad_dtype_for, logits_may_be_narrow
from kdscale_kernels.fused.row_chunks import run_fast
from kdscale_kernels.fused.vocab_slices import run_lean
from kdscale_kernels.ops import arguments
from kdscale_kernels.rows import teacher_entries as target_lists
from kdscale_kernels.rows.limits import sparse_limit
from kdscale_kernels.types import Backend, LossOptions, Mode, SparseKL, Tail


def linear_sparse_kl(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    ids_NK: Tensor,
    teacher_logits_NK: Tensor,
    teacher_lse_N: Tensor,
    *,
    labels_N: Tensor,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence | str = "forward_kl",
    tail: Tail = "bucket",
    target_weights_NK: Tensor | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    mode: Mode = "auto",
    workspace_bytes: int | None = None,
    chunk_bytes: int | None = None,
    backend: Backend = "auto",
) -> SparseKL:
    """Sum over valid rows of ce_weight·CE + (1 - ce_weight)·T²·D(teacher, student) from hidden states and a head.

    hidden_NH [N,H], weight_VH [V,H], bias_V [V]: the student's; floating, mixed dtypes are promoted, autocast obeyed.
    ids_NK [N,K] integer, teacher_logits_NK [N,K], teacher_lse_N [N]: as linear_topk_lse gives them, the log-sum-exp at
    this same temperature. A slot with logit -inf is empty. labels_N [N]: already shifted; rows equal to ignore_index
    count for nothing. tail: "bucket" treats everything outside the K entries as one bucket, "truncated" leaves it out
    of the sum (may be negative), "renormalised" rescales both sides to the K entries. vocab_size keeps the first
    entries of a padded head.

    mode: "fast" takes chunks of rows and sums dW over them, "lean" slices of the vocabulary, finishing each slice of dW
    at once (modes.py); "auto" is fast where that fits in workspace_bytes, the memory beyond inputs and gradients (None:
    104 MiB on a CPU, unlimited on CUDA). chunk_bytes: logits of a fast chunk or a lean slice (None: as measured best).

    divergence: a name in DIVERGENCES (which has formulas and sources), or a Divergence with its parameter.
    tail="sampled" (RS-KD, arXiv 2503.16870): the ids were drawn from the teacher, repeats allowed, and
    target_weights_NK [N,K] are their importance weights w (in proportion to p / the probability of the draw, usually
    scaled to sum to one); D is Σ w·log(w / q), with the gradient q·Σw - w. The teacher's logits then only mark empty
    slots and its first id.

    Differentiable once, with respect to hidden_NH, weight_VH and bias_V. Logits live in fp32 (lean on a CPU: bf16
    where that costs the gradient nothing, narrow.py), a chunk or a slice (and those that lean holds) at a time. One
    wait for the device, to count the valid rows (lean without Triton: two); none in the results.
    Raises ValueError for arguments that do not fit together and, on a CPU, for NaN targets and ids out of range.
    """
    options = LossOptions(ce_weight, temperature, Divergence.of(divergence), tail, softcap)
    arguments.check_linear(hidden_NH, weight_VH, bias_V)
    arguments.check_targets(hidden_NH.shape[0], ids_NK, teacher_logits_NK, teacher_lse_N, labels_N)
    arguments.check_weights(ids_NK, target_weights_NK, tail)
    arguments.check_same_device(hidden_NH, ids_NK)
    vocab = arguments.resolve_vocab(vocab_size, weight_VH.shape[0], "weight")
    operand, accumulate = compute_dtypes(hidden_NH, weight_VH)
    chosen = choose_backend(
        backend, hidden_NH.device, cannot=sparse_limit(options.divergence, ids_NK.shape[1], accumulate)
    )
    valid_M = (labels_N != ignore_index).nonzero()[:, 0]
    labels_M, ids_MK = labels_N[valid_M].long(), ids_NK[valid_M].long()
    logits_MK, lse_M = teacher_logits_NK[valid_M].to(accumulate), teacher_lse_N[valid_M].to(accumulate)
    weights_MK = None if target_weights_NK is None else target_weights_NK[valid_M].to(accumulate)
    arguments.check_target_values(ids_MK, logits_MK, lse_M, labels_M, vocab)
    arguments.check_weight_values(weights_MK, logits_MK)
    grad_on = torch.is_grad_enabled()
    wanted = tuple(grad_on and t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias_V))
    shape = Shape(
        rows=valid_M.numel(),
        hidden=hidden_NH.shape[1],
        vocab=vocab,
        device=hidden_NH.device.type,
        buffers=options.buffers if chosen == "torch" else 1,
        item_bytes=accumulate.itemsize,
        head_copy=hidden_NH.device.type == "cpu" and weight_VH.dtype != accumulate,
        weight_sum=wanted[1] and weight_VH.dtype != accumulate,
        hidden_sum=wanted[0] and hidden_NH.dtype != accumulate,
        kept_bytes=grad_dtype_for(hidden_NH.device, operand, accumulate).itemsize * options.exponentials,
        narrow=chosen == "torch"
        and bias_V is None
        and softcap is None
        and logits_may_be_narrow(hidden_NH.device, operand),
    )
    problem = Problem(
        valid_M,
        labels_M,
        target_lists.prepare(ids_MK, logits_MK, lse_M, vocab, temperature, weights_MK),
        options,
        vocab,
        layout_for(shape, mode, workspace_bytes, chunk_bytes),
        operand,
        accumulate,
        chosen,
        wanted,
    )
    run = run_lean if problem.layout.mode == "lean" else run_fast
    outputs = made_in_forward(
        "linear_sparse_kl", lambda: run(hidden_NH, weight_VH, bias_V, problem), hidden_NH, weight_VH, bias_V
    )
    tokens = torch.full((), valid_M.numel(), dtype=torch.int64, device=hidden_NH.device)
    return SparseKL(outputs[0], tokens, *outputs[1:])
