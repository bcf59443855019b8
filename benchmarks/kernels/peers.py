"""Other people's packages. Each is imported when it is first run; one that is missing becomes a row that says so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from contestants import BACKWARD, Contestant
from inputs import Inputs
from torch import Tensor

BOTH_HEADS, STUDENT = "teacher_and_student", "linear_sparse_kl"


def version(package: str) -> str:
    """The installed version of a package, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source tree" if importlib.util.find_spec(package) else ""


def _absent(package: str, module: str, device: torch.device, cuda_only: bool) -> str:
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    if cuda_only and device.type != "cuda":
        return f"a Triton kernel: needs a GPU, and this is a {device.type}"
    if cuda_only and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def liger_chunked(beta: float, chunk: int, compiled: bool) -> Callable[[Inputs], Tensor]:
    """Liger's chunked distillation loss; beta 0 is forward KL over the whole vocabulary, its cheapest divergence."""

    def make(p: Inputs) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled, chunk_size=chunk
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loss(p.hidden_NH, p.weight_VH, p.teacher_NH, p.weight_VH.detach(), p.labels_N)

    return make


def liger_jsd(beta: float) -> Callable[[Inputs], Tensor]:
    """Liger's fused linear JSD, a Triton kernel; beta 0 is forward KL."""

    def make(p: Inputs) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=beta)
        return loss(p.hidden_NH, p.weight_VH, p.teacher_NH, p.weight_VH.detach(), p.labels_N)

    return make


def liger_kl_div(p: Inputs) -> Tensor:
    """Liger's fused linear KL, which takes the teacher's whole distribution as an input."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    return LigerFusedLinearKLDivLoss(reduction="sum")(p.hidden_NH, p.weight_VH, p.teacher_probs_NV)


def cut_cross_entropy(impl: str, eps: str | None) -> Callable[[Inputs], Tensor]:
    """Cut Cross-Entropy (Wijmans et al. 2024) in one of its implementations."""

    def make(p: Inputs) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(p.hidden_NH, p.weight_VH, p.labels_N, impl=impl, filter_eps=eps, reduction="sum")

    return make


def torch_cross_entropy(chunked: bool) -> Callable[[Inputs], Tensor]:
    """torch's own linear cross-entropy."""

    def make(p: Inputs) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return F.linear_cross_entropy(p.hidden_NH, p.weight_VH, p.labels_N, reduction="sum", options=options)

    return make


def peers(device: torch.device) -> list[Contestant]:
    """Liger's chunk sizes and its compiler, so that the best can be picked from the table, beside its defaults."""
    return [*_liger(device), *_cross_entropies(device)]


def _liger(device: torch.device) -> list[Contestant]:
    package = "liger-kernel"
    absent = _absent(package, "liger_kernel", device, cuda_only=False)
    absent_cpu = _absent(package, "liger_kernel", device, cuda_only=True)

    def chunked(op: str, mode: str, loss: str, beta: float, chunk: int, compiled: bool, **options: Any) -> Contestant:
        make = liger_chunked(beta, chunk, compiled)
        common = {"package": package, "absent": absent, "mean": True, "compiled": compiled}
        return Contestant(op, "Liger chunked loss", mode, loss, make, BACKWARD, **common, **options)

    rows = [
        chunked(BOTH_HEADS, f"KL {chunk}{' compiled' * compiled}", "full KL", 0.0, chunk, compiled)
        for chunk in (256, 512, 1024)
        for compiled in (True, False)
    ]
    rows.append(chunked(BOTH_HEADS, "JSD, defaults", "full JSD", 0.5, 1024, True))
    for chunk in (256, 512):
        mode = f"KL {chunk} compiled, less a product"
        rows.append(chunked(STUDENT, mode, "full KL", 0.0, chunk, True, less_product=True))
    on_gpu = {"directions": BACKWARD, "package": package, "absent": absent_cpu}
    for beta, mode in ((0.0, "KL"), (0.5, "JSD")):
        make = liger_jsd(beta)
        rows.append(Contestant(BOTH_HEADS, "Liger fused linear JSD", mode, f"full {mode}", make, mean=True, **on_gpu))
    mode = "target: whole distribution"
    name, needs = "Liger fused linear KL", "teacher_probs"
    return [*rows, Contestant(STUDENT, name, mode, "full KL", liger_kl_div, needs=needs, **on_gpu)]


def _cross_entropies(device: torch.device) -> list[Contestant]:
    """Another loss (hard labels), from the same tensors: what time and memory this class of kernel costs elsewhere."""
    package = "cut-cross-entropy"
    on_gpu = {"package": package, "absent": _absent(package, "cut_cross_entropy", device, cuda_only=True)}
    anywhere = {"package": package, "absent": _absent(package, "cut_cross_entropy", device, cuda_only=False)}
    missing = "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} does not have it"
    name = "torch linear_cross_entropy"
    return [
        Contestant(STUDENT, "cut-cross-entropy", "filtered", "CE", cut_cross_entropy("cce", "auto"), **on_gpu),
        Contestant(STUDENT, "cut-cross-entropy", "exact", "CE", cut_cross_entropy("cce", None), **on_gpu),
        Contestant(
            STUDENT,
            "cut-cross-entropy",
            "torch_compile",
            "CE",
            cut_cross_entropy("torch_compile", None),
            compiled=True,
            **anywhere,
        ),
        Contestant(STUDENT, name, "chunked", "CE", torch_cross_entropy(True), absent=missing),
        Contestant(STUDENT, name, "whole", "CE", torch_cross_entropy(False), absent=missing),
    ]
