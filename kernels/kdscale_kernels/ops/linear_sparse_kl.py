"""linear_sparse_kl: distillation loss on K teacher entries a token, straight from the student's hidden states.

Legend: N rows, M valid rows, H hidden size, V vocabulary, K teacher entries, T temperature.

The gradients are made in the forward pass (fused/autograd.py), by row chunks or vocabulary slices
(fused/memory_plan.py): N×V logits never exist.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.backend import choose_backend
from kdscale_kernels.divergence import Divergence
from kdscale_kernels.fused.autograd import runs_eagerly, wants_gradients, with_forward_gradients
from kdscale_kernels.fused.memory_plan import CallSize, SparseCall, plan_memory
from kdscale_kernels.fused.products import bf16_logits_are_fast, compute_dtypes, grad_dtype_for
from kdscale_kernels.fused.row_chunks import run_row_chunks
from kdscale_kernels.fused.vocab_slices import run_vocab_slices
from kdscale_kernels.ops import arguments
from kdscale_kernels.row_steps import row_steps
from kdscale_kernels.triton_kernels.limits import sparse_limit
from kdscale_kernels.types import IGNORE_INDEX, Backend, LossOptions, Mode, SparseKL, Tail


@runs_eagerly
def linear_sparse_kl(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    ids_NK: Tensor,
    teacher_logits_NK: Tensor,
    teacher_lse_N: Tensor,
    *,
    labels_N: Tensor,
    ignore_index: int | None = IGNORE_INDEX,
    ce_weight: float | Tensor = 0.0,
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
    this same temperature. A slot with logit -inf is empty; an id may repeat with the same logit. labels_N [N]:
    already shifted; rows equal to ignore_index count for nothing; with ignore_index=None every row counts, and nothing
    waits for the device to count them. All of these may have [B,S] in place of N. tail:
    "bucket" treats everything outside the K entries as one bucket, "truncated" leaves it out of the sum (may be
    negative), "renormalised" rescales both sides to the K entries. vocab_size keeps the first entries of a padded head.

    mode: "row_chunks" takes chunks of rows and sums dW over them; "vocab_slices" takes slices of the vocabulary and
    finishes each slice of dW at once (fused/memory_plan.py); "auto" takes row chunks where they fit in workspace_bytes,
    the memory beyond inputs and gradients (None: 104 MiB on a CPU, unlimited on CUDA). chunk_bytes: logits of a chunk
    or a slice (None: what measured best).

    ce_weight: from 0 to 1, for all rows, or a floating tensor [N] of one a row, which is a constant.
    divergence: a name in DIVERGENCES (which has formulas and sources), or a Divergence with its parameter.
    tail="sampled" (RS-KD, arXiv 2503.16870): the ids were drawn from the teacher, repeats allowed, and
    target_weights_NK [N,K] are their importance weights w (in proportion to p / the probability of the draw, usually
    scaled to sum to one); D is Σ w·log(w / q), with the gradient q·Σw - w. The teacher's logits then only mark empty
    slots and its first id.

    Differentiable once, with respect to hidden_NH, weight_VH and bias_V. Logits live in fp32 (vocabulary slices on a
    CPU: in bf16 where that costs the gradient nothing, fused/bf16_slices.py), a chunk or a slice and those kept at a
    time. Waits once for the device, to count the valid rows, if there is an ignore_index, and for vocabulary slices
    without Triton once for each block of rows.
    Raises ValueError for arguments that do not fit together and, on a CPU, for ids out of range and targets that no
    teacher gives: NaN, +inf, a log-sum-exp below its entries', an id with two logits; elsewhere the loss is then NaN.
    """
    for_all, ce_weight_N = arguments.ce_weight_of_rows(ce_weight)
    options = LossOptions(for_all, temperature, Divergence.of(divergence), tail, softcap)
    _, hidden_NH, *targets, labels_N, ce_weight_N = arguments.as_rows(
        hidden_NH=hidden_NH,
        ids_NK=ids_NK,
        teacher_logits_NK=teacher_logits_NK,
        teacher_lse_N=teacher_lse_N,
        target_weights_NK=target_weights_NK,
        labels_N=labels_N,
        ce_weight_N=ce_weight_N,
    )
    arguments.check_linear(hidden_NH, weight_VH, bias_V)
    arguments.check_targets(hidden_NH.shape[0], targets, labels_N, tail)
    arguments.check_ce_weights(ce_weight_N, labels_N)
    arguments.check_same_device(hidden_NH, labels_N)
    vocab = arguments.resolve_vocab(vocab_size, weight_VH.shape[0], "weight")
    operand, accumulate = compute_dtypes(hidden_NH, weight_VH)
    limit = sparse_limit(options.divergence, targets[0].shape[1], accumulate)
    plain_head = bias_V is None and softcap is None
    bf16_logits = plain_head and bf16_logits_are_fast(hidden_NH.device, operand)
    many = len(hidden_NH) * vocab if bf16_logits else 0
    steps = row_steps(choose_backend(backend, hidden_NH.device, limit=limit, bf16_logits=many))
    valid = arguments.valid_rows(targets, labels_N, ignore_index, vocab, temperature, accumulate, ce_weight_N)
    wants_grad = wants_gradients(hidden_NH, weight_VH, bias_V)
    size = CallSize(
        rows=valid.index_M.numel(),
        hidden=hidden_NH.shape[1],
        vocab=vocab,
        device=hidden_NH.device.type,
        buffers=steps.sparse_buffers(options),
        item_bytes=accumulate.itemsize,
        head_copy=hidden_NH.device.type == "cpu" and weight_VH.dtype != accumulate,
        weight_sum=wants_grad[1] and weight_VH.dtype != accumulate,
        hidden_sum=wants_grad[0] and hidden_NH.dtype != accumulate,
        kept_bytes=grad_dtype_for(hidden_NH.device, operand, accumulate).itemsize * options.exponentials,
        bf16_logits=bf16_logits and steps.bf16_steps is not None,
    )
    plan = plan_memory(size, mode, workspace_bytes, chunk_bytes)
    call = SparseCall(*valid, options, vocab, plan, operand, accumulate, steps, wants_grad)
    run = run_vocab_slices if plan.mode == "vocab_slices" else run_row_chunks
    outputs = with_forward_gradients("linear_sparse_kl", run, hidden_NH, weight_VH, bias_V, call)
    tokens = torch.full((), valid.index_M.numel(), dtype=torch.int64, device=hidden_NH.device)
    return SparseKL(outputs[0], tokens, *outputs[1:])
