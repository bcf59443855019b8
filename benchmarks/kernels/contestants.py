"""Who takes part: this package, the bare products that bound it, and plain torch. Other people's packages: peers.py.

Legend: N rows, H hidden size, V vocabulary, K teacher entries.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from inputs import Inputs
from torch import Tensor

import kdscale_kernels as kk

# Forward: the loss alone, under no_grad. Losses that make their gradients anyway are timed forward+backward only.
BOTH, BACKWARD, FORWARD = ("forward", "forward+backward"), ("forward+backward",), ("forward",)
KDSCALE = ("kdscale", "auto")

Make = Callable[[Inputs], Tensor | tuple[Tensor, ...]]


class NotHereError(RuntimeError):
    """A contestant that cannot run here, and why."""


@dataclass(frozen=True)
class Contestant:
    """One way of doing `op`. `loss` names the fp64 truth (inputs.LOSSES); None has no gradients to compare.

    `make(inputs)` returns the scalar loss, or None if nothing is left to differentiate.
    """

    op: str
    name: str
    mode: str
    loss: str | None
    make: Make
    directions: tuple[str, ...] = BOTH
    package: str = "torch"
    mean: bool = False  # the loss is a mean over rows: its gradients are multiplied by N before they are compared
    compiled: bool = False  # compiles for each shape: is warmed up at that shape before memory is measured
    less_product: bool = False  # the time of one bare product, taken right after, is subtracted
    needs: str = ""  # an [N,V] input more: see inputs.make_inputs
    fresh_logits: bool = False  # writes over the logits: gets a new copy of them, outside the timing
    absent: str = ""  # why it cannot run here

    @property
    def key(self) -> tuple[str, str]:
        """What tells contestants of one op apart."""
        return self.name, self.mode


def step(contestant: Contestant, inputs: Inputs, direction: str) -> None:
    """One call. Forward+backward leaves its gradients in the inputs's leaves."""
    if direction == "forward":
        with torch.no_grad():
            contestant.make(inputs)
        return
    loss = contestant.make(inputs)
    if loss is not None:
        if not loss.requires_grad:
            raise NotHereError("this version gives no gradients")
        loss.backward()


def products(inputs: Inputs, teacher: bool = False) -> None:
    """The yardstick: z = XWᵀ, and with gradients dX = zW and dW = zᵀX, in the inputs' own dtype."""
    backward = torch.is_grad_enabled()
    with torch.no_grad():
        if teacher:
            F.linear(inputs.teacher_NH, inputs.weight_VH)
        z_NV = F.linear(inputs.hidden_NH, inputs.weight_VH)
        if backward:
            inputs.hidden_NH.grad = z_NV @ inputs.weight_VH
            inputs.weight_VH.grad = z_NV.T @ inputs.hidden_NH


def teacher_product(inputs: Inputs) -> None:
    """The teacher's logits alone."""
    with torch.no_grad():
        F.linear(inputs.teacher_NH, inputs.weight_VH)


def copy_logits(inputs: Inputs) -> None:
    """One read and one write of the logits: what a loss on existing logits cannot beat."""
    with torch.no_grad():
        logits(inputs).clone()


def logits(inputs: Inputs) -> Tensor:
    """The student's logits that a loss on existing logits starts from."""
    assert inputs.student_logits_NV is not None
    return inputs.student_logits_NV


def eager_loss(z_NV: Tensor, p: Inputs) -> Tensor:
    """The sparse KL as most loops write it: log-softmax in fp32 of logits in the model's dtype, gather, 1 - sum."""
    logq_NV = z_NV.float().log_softmax(1)
    logp_NK = p.logits_NK - p.lse_N[:, None]
    logq_NK = logq_NV.gather(1, p.ids_NK)
    p_tail_N = (1 - logp_NK.exp().sum(1)).clamp(min=1e-9)
    q_tail_N = (1 - logq_NK.exp().sum(1)).clamp(min=1e-9)
    return (logp_NK.exp() * (logp_NK - logq_NK)).sum() + (p_tail_N * (p_tail_N.log() - q_tail_N.log())).sum()


def eager_sparse(p: Inputs) -> Tensor:
    """The sparse KL from hidden states, in plain torch."""
    return eager_loss(F.linear(p.hidden_NH, p.weight_VH), p)


def eager_on_logits(p: Inputs) -> Tensor:
    """The sparse KL from existing logits, in plain torch."""
    return eager_loss(logits(p), p)


def eager_targets(p: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's top-k and log-sum-exp, in plain torch."""
    with torch.no_grad():
        z_NV = F.linear(p.teacher_NH, p.weight_VH)
        top = z_NV.topk(p.ids_NK.shape[1], dim=1)
        return top.indices, top.values.float(), z_NV.float().logsumexp(1)


def eager_end_to_end(p: Inputs) -> Tensor:
    """Both sides of the sparse KL, in plain torch."""
    ids, values, lse = eager_targets(p)
    return eager_sparse(replace(p, ids_NK=ids, logits_NK=values, lse_N=lse))


def eager_full(p: Inputs) -> Tensor:
    """Both sides of the full KL, in plain torch."""
    with torch.no_grad():
        logp_NV = F.linear(p.teacher_NH, p.weight_VH).float().log_softmax(1)
    logq_NV = F.linear(p.hidden_NH, p.weight_VH).float().log_softmax(1)
    return F.kl_div(logq_NV, logp_NV, reduction="sum", log_target=True)


def kdscale_sparse(p: Inputs, **options: object) -> Tensor:
    """linear_sparse_kl."""
    call: Callable[..., kk.SparseKL] = kk.linear_sparse_kl
    targets = (p.ids_NK, p.logits_NK, p.lse_N)
    return call(p.hidden_NH, p.weight_VH, *targets, labels_N=p.labels_N, **options).loss_sum


def kdscale_topk(p: Inputs, **options: Any) -> tuple[Tensor, ...]:
    """linear_topk_lse."""
    return kk.linear_topk_lse(p.teacher_NH, p.weight_VH, p.ids_NK.shape[1], **options)


def kdscale_end_to_end(p: Inputs, **options: object) -> Tensor:
    """linear_topk_lse, then linear_sparse_kl."""
    backend: Any = options.get("backend", "auto")
    targets = kk.linear_topk_lse(p.teacher_NH, p.weight_VH, p.ids_NK.shape[1], backend=backend)
    call: Callable[..., kk.SparseKL] = kk.linear_sparse_kl
    return call(p.hidden_NH, p.weight_VH, *targets, labels_N=p.labels_N, **options).loss_sum


def kdscale_on_logits(p: Inputs, inplace_grad: bool = False) -> Tensor:
    """sparse_kl."""
    targets = (p.ids_NK, p.logits_NK, p.lse_N)
    return kk.sparse_kl(logits(p), *targets, labels_N=p.labels_N, inplace_grad=inplace_grad).loss_sum


def kdscale_full(p: Inputs) -> Tensor:
    """linear_full_kl."""
    call: Callable[..., kk.FullKL] = kk.linear_full_kl
    return call(p.hidden_NH, p.weight_VH, p.teacher_NH, p.weight_VH.detach(), labels_N=p.labels_N).loss_sum


@functools.cache
def compiled(function: Make) -> Make:
    """torch.compile of a function of the inputs's tensors, for one shape."""
    return torch.compile(function, dynamic=False)


def _own(op: str, make: Callable[..., Tensor], device: torch.device) -> list[Contestant]:
    """linear_sparse_kl as it comes, in each mode, and with other budgets."""
    variants: dict[str, dict[str, object]] = {
        "auto": {},
        "row chunks": {"mode": "row_chunks"},
        "vocabulary slices": {"mode": "vocab_slices"},
    }
    if device.type == "cpu":
        variants["without C"] = {"backend": "torch"}
    if op == "linear_sparse_kl":
        for mib in (32, 512) if device.type == "cpu" else (450, 4096):
            variants[f"workspace {mib} MiB"] = {"workspace_bytes": mib << 20}
        if device.type == "cuda":  # each chunk reads and writes all of an fp32 dW: fewer, larger ones may be worth it
            for gib in (2, 4):
                variants[f"row chunks of {gib} GiB"] = {"mode": "row_chunks", "chunk_bytes": gib << 30}
    return [
        Contestant(op, "kdscale", mode, "sparse KL", functools.partial(make, **options), package="kdscale")
        for mode, options in variants.items()
    ]


def _compiled(op: str, mode: str, loss: str | None, make: Make, **options: Any) -> Contestant:
    def run(inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = compiled(make)(inputs)
        if made is None:
            raise TypeError(f"{op}: a compiled function without a result is compiled to nothing")
        return made

    return Contestant(op, "torch.compile", mode, loss, run, compiled=True, **options)


def own_and_torch(device: torch.device) -> list[Contestant]:
    """All contestants but other people's packages, op by op."""
    op = "linear_sparse_kl"
    sparse = [
        *_own(op, kdscale_sparse, device),
        Contestant(op, "bare products", "", None, products),
        Contestant(op, "eager torch", "", "sparse KL", eager_sparse),
        _compiled(op, "", "sparse KL", eager_sparse),
    ]
    op = "teacher_and_student"
    both = [
        *_own(op, kdscale_end_to_end, device),
        Contestant(op, "kdscale", "linear_full_kl", "full KL", kdscale_full, package="kdscale"),
        Contestant(op, "bare products", "", None, functools.partial(products, teacher=True)),
        Contestant(op, "eager torch", "top-k", "sparse KL", eager_end_to_end),
        Contestant(op, "eager torch", "full KL", "full KL", eager_full),
        _compiled(op, "top-k", "sparse KL", eager_end_to_end),
        _compiled(op, "full KL", "full KL", eager_full),
    ]
    op = "linear_topk_lse"
    topk = [
        Contestant(op, "kdscale", "auto", None, kdscale_topk, FORWARD, package="kdscale"),
        Contestant(op, "bare products", "", None, teacher_product, FORWARD),
        Contestant(op, "eager torch", "", None, eager_targets, FORWARD),
        _compiled(op, "", None, eager_targets, directions=FORWARD),
    ]
    if device.type == "cpu":
        make = functools.partial(kdscale_topk, backend="torch")
        topk.append(Contestant(op, "kdscale", "without C", None, make, FORWARD, package="kdscale"))
    op, needs = "sparse_kl", "student_logits"
    on_logits = [
        Contestant(op, "kdscale", "auto", "sparse KL", kdscale_on_logits, package="kdscale", needs=needs),
        Contestant(
            op,
            "kdscale",
            "in place",
            "sparse KL",
            functools.partial(kdscale_on_logits, inplace_grad=True),
            BACKWARD,
            package="kdscale",
            needs=needs,
            fresh_logits=True,
        ),
        Contestant(op, "bare copy", "", None, copy_logits, needs=needs),
        Contestant(op, "eager torch", "", "sparse KL", eager_on_logits, needs=needs),
        _compiled(op, "", "sparse KL", eager_on_logits, needs=needs),
    ]
    return [*sparse, *both, *topk, *on_logits]
