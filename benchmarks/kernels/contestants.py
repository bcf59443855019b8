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
from problems import Problem
from torch import Tensor

import kdscale_kernels as kk

# Forward: the loss alone, under no_grad. Losses that make their gradients anyway are timed forward+backward only.
BOTH, BACKWARD, FORWARD = ("forward", "forward+backward"), ("forward+backward",), ("forward",)
OURS = ("kdscale", "auto")

Make = Callable[[Problem], Tensor | tuple[Tensor, ...]]


class NotHereError(RuntimeError):
    """A contestant that cannot run here, and why."""


@dataclass(frozen=True)
class Contestant:
    """One way of doing `op`. `loss` names the fp64 truth (problems.LOSSES); None has no gradients to compare.

    `make(problem)` returns the scalar loss, or None if nothing is left to differentiate.
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
    needs: str = ""  # an [N,V] input more: see problems.make_problem
    fresh_logits: bool = False  # writes over the logits: gets a new copy of them, outside the timing
    absent: str = ""  # why it cannot run here

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.mode


def step(contestant: Contestant, problem: Problem, direction: str) -> None:
    """One call. Forward+backward leaves its gradients in the problem's leaves."""
    if direction == "forward":
        with torch.no_grad():
            contestant.make(problem)
        return
    loss = contestant.make(problem)
    if loss is not None:
        if not loss.requires_grad:
            raise NotHereError("this version gives no gradients")
        loss.backward()


def products(problem: Problem, teacher: bool = False) -> None:
    """The yardstick: z = XWᵀ, and with gradients dX = zW and dW = zᵀX, in the inputs' own dtype."""
    backward = torch.is_grad_enabled()
    with torch.no_grad():
        if teacher:
            F.linear(problem.teacher_NH, problem.weight_VH)
        z_NV = F.linear(problem.hidden_NH, problem.weight_VH)
        if backward:
            problem.hidden_NH.grad = z_NV @ problem.weight_VH
            problem.weight_VH.grad = z_NV.T @ problem.hidden_NH


def teacher_product(problem: Problem) -> None:
    with torch.no_grad():
        F.linear(problem.teacher_NH, problem.weight_VH)


def copy_logits(problem: Problem) -> None:
    """One read and one write of the logits: what a loss on existing logits cannot beat."""
    with torch.no_grad():
        logits(problem).clone()


def logits(problem: Problem) -> Tensor:
    assert problem.student_logits_NV is not None
    return problem.student_logits_NV


def eager_loss(z_NV: Tensor, p: Problem) -> Tensor:
    """The sparse KL as most loops write it: log-softmax in fp32 of logits in the model's dtype, gather, 1 - sum."""
    logq_NV = z_NV.float().log_softmax(1)
    logp_NK = p.logits_NK - p.lse_N[:, None]
    logq_NK = logq_NV.gather(1, p.ids_NK)
    p_tail_N = (1 - logp_NK.exp().sum(1)).clamp(min=1e-9)
    q_tail_N = (1 - logq_NK.exp().sum(1)).clamp(min=1e-9)
    return (logp_NK.exp() * (logp_NK - logq_NK)).sum() + (p_tail_N * (p_tail_N.log() - q_tail_N.log())).sum()


def eager_sparse(p: Problem) -> Tensor:
    return eager_loss(F.linear(p.hidden_NH, p.weight_VH), p)


def eager_on_logits(p: Problem) -> Tensor:
    return eager_loss(logits(p), p)


def eager_targets(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        z_NV = F.linear(p.teacher_NH, p.weight_VH)
        top = z_NV.topk(p.ids_NK.shape[1], dim=1)
        return top.indices, top.values.float(), z_NV.float().logsumexp(1)


def eager_end_to_end(p: Problem) -> Tensor:
    ids, values, lse = eager_targets(p)
    return eager_sparse(replace(p, ids_NK=ids, logits_NK=values, lse_N=lse))


def eager_full(p: Problem) -> Tensor:
    with torch.no_grad():
        logp_NV = F.linear(p.teacher_NH, p.weight_VH).float().log_softmax(1)
    logq_NV = F.linear(p.hidden_NH, p.weight_VH).float().log_softmax(1)
    return F.kl_div(logq_NV, logp_NV, reduction="sum", log_target=True)


def ours_sparse(p: Problem, **options: object) -> Tensor:
    call: Callable[..., kk.SparseKL] = kk.linear_sparse_kl
    targets = (p.ids_NK, p.logits_NK, p.lse_N)
    return call(p.hidden_NH, p.weight_VH, *targets, labels_N=p.labels_N, **options).loss_sum


def ours_topk(p: Problem) -> tuple[Tensor, ...]:
    return kk.linear_topk_lse(p.teacher_NH, p.weight_VH, p.ids_NK.shape[1])


def ours_end_to_end(p: Problem, **options: object) -> Tensor:
    targets = kk.linear_topk_lse(p.teacher_NH, p.weight_VH, p.ids_NK.shape[1])
    call: Callable[..., kk.SparseKL] = kk.linear_sparse_kl
    return call(p.hidden_NH, p.weight_VH, *targets, labels_N=p.labels_N, **options).loss_sum


def ours_on_logits(p: Problem, inplace_grad: bool = False) -> Tensor:
    targets = (p.ids_NK, p.logits_NK, p.lse_N)
    return kk.sparse_kl(logits(p), *targets, labels_N=p.labels_N, inplace_grad=inplace_grad).loss_sum


def ours_full(p: Problem) -> Tensor:
    call: Callable[..., kk.FullKL] = kk.linear_full_kl
    return call(p.hidden_NH, p.weight_VH, p.teacher_NH, p.weight_VH.detach(), labels_N=p.labels_N).loss_sum


@functools.cache
def compiled(function: Make) -> Make:
    """torch.compile of a function of the problem's tensors, for one shape."""
    return torch.compile(function, dynamic=False)


def _own(op: str, make: Callable[..., Tensor], device: torch.device) -> list[Contestant]:
    """linear_sparse_kl as it comes, in each mode, and with other budgets."""
    variants: dict[str, dict[str, object]] = {"auto": {}, "fast": {"mode": "fast"}, "lean": {"mode": "lean"}}
    if op == "linear_sparse_kl":
        for mib in (32, 512) if device.type == "cpu" else (450, 4096):
            variants[f"workspace {mib} MiB"] = {"workspace_bytes": mib << 20}
        if device.type == "cuda":  # each chunk reads and writes all of an fp32 dW: fewer, larger ones may be worth it
            for gib in (2, 4):
                variants[f"fast, chunks of {gib} GiB"] = {"mode": "fast", "chunk_bytes": gib << 30}
    return [
        Contestant(op, "kdscale", mode, "sparse KL", functools.partial(make, **options), package="kdscale")
        for mode, options in variants.items()
    ]


def _compiled(op: str, mode: str, loss: str | None, make: Make, **options: Any) -> Contestant:
    def run(problem: Problem) -> Tensor | tuple[Tensor, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = compiled(make)(problem)
        if made is None:
            raise TypeError(f"{op}: a compiled function without a result is compiled to nothing")
        return made

    return Contestant(op, "torch.compile", mode, loss, run, compiled=True, **options)


def own_and_torch(device: torch.device) -> list[Contestant]:
    """All contestants but other people's packages, op by op."""
    op = "linear_sparse_kl"
    sparse = [
        *_own(op, ours_sparse, device),
        Contestant(op, "bare products", "", None, products),
        Contestant(op, "eager torch", "", "sparse KL", eager_sparse),
        _compiled(op, "", "sparse KL", eager_sparse),
    ]
    op = "teacher_and_student"
    both = [
        *_own(op, ours_end_to_end, device),
        Contestant(op, "kdscale", "linear_full_kl", "full KL", ours_full, package="kdscale"),
        Contestant(op, "bare products", "", None, functools.partial(products, teacher=True)),
        Contestant(op, "eager torch", "top-k", "sparse KL", eager_end_to_end),
        Contestant(op, "eager torch", "full KL", "full KL", eager_full),
        _compiled(op, "top-k", "sparse KL", eager_end_to_end),
        _compiled(op, "full KL", "full KL", eager_full),
    ]
    op = "linear_topk_lse"
    topk = [
        Contestant(op, "kdscale", "auto", None, ours_topk, FORWARD, package="kdscale"),
        Contestant(op, "bare products", "", None, teacher_product, FORWARD),
        Contestant(op, "eager torch", "", None, eager_targets, FORWARD),
        _compiled(op, "", None, eager_targets, directions=FORWARD),
    ]
    op, needs = "sparse_kl", "student_logits"
    on_logits = [
        Contestant(op, "kdscale", "auto", "sparse KL", ours_on_logits, package="kdscale", needs=needs),
        Contestant(
            op,
            "kdscale",
            "in place",
            "sparse KL",
            functools.partial(ours_on_logits, inplace_grad=True),
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
