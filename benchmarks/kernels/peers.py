"""Other people's packages. Each is imported when it is first run; one that is missing becomes a row that says so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contestants import BACKWARD, Contestant
from problems import Problem
from torch import Tensor

BOTH_HEADS, STUDENT = "teacher_and_student", "linear_sparse_kl"


def version(package: str) -> str:
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


def liger_chunked(beta: float, chunk: int, compiled: bool) -> Callable[[Problem], Tensor]:
    """Liger's chunked distillation loss; beta 0 is forward KL over the whole vocabulary, its cheapest divergence."""

    def make(p: Problem) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled, chunk_size=chunk
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loss(p.hidden_NH, p.weight_VH, p.teacher_NH, p.weight_VH.detach(), p.labels_N)

    return make


def liger_jsd(beta: float) -> Callable[[Problem], Tensor]:
    def make(p: Problem) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=beta)
        return loss(p.hidden_NH, p.weight_VH, p.teacher_NH, p.weight_VH.detach(), p.labels_N)

    return make


def liger_kl_div(p: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    return LigerFusedLinearKLDivLoss(reduction="sum")(p.hidden_NH, p.weight_VH, p.teacher_probs_NV)


def cut_cross_entropy(impl: str, eps: str | None) -> Callable[[Problem], Tensor]:
    def make(p: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(p.hidden_NH, p.weight_VH, p.labels_N, impl=impl, filter_eps=eps, reduction="sum")

    return make


def torch_cross_entropy(chunked: bool) -> Callable[[Problem], Tensor]:
    def make(p: Problem) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return F.linear_cross_entropy(p.hidden_NH, p.weight_VH, p.labels_N, reduction="sum", options=options)

    return make


def peers(device: torch.device) -> list[Contestant]:
    """Their best settings, found on the official CPU shape, beside their defaults."""
    return [*_liger(device), *_cross_entropies(device)]


def _liger(device: torch.device) -> list[Contestant]:
    package = "liger-kernel"
    anywhere = {"package": package, "absent": _absent(package, "liger_kernel", device, cuda_only=False)}
    on_gpu = {"package": package, "absent": _absent(package, "liger_kernel", device, cuda_only=True)}
    name, rows = "Liger chunked loss", []
    for chunk in (256, 512, 1024):
        for compiled in (True, False):
            mode = f"KL, chunk {chunk}" + (", compiled" if compiled else "")
            make = liger_chunked(0.0, chunk, compiled)
            rows.append(
                Contestant(BOTH_HEADS, name, mode, "full KL", make, BACKWARD, mean=True, compiled=compiled, **anywhere)
            )
    make = liger_chunked(0.5, 1024, True)
    rows.append(
        Contestant(BOTH_HEADS, name, "JSD, defaults", "full JSD", make, BACKWARD, mean=True, compiled=True, **anywhere)
    )
    for chunk in (256, 1024):
        rows.append(
            Contestant(
                STUDENT,
                name,
                f"KL, chunk {chunk}, compiled, less the teacher's product",
                "full KL",
                liger_chunked(0.0, chunk, True),
                BACKWARD,
                mean=True,
                compiled=True,
                less_product=True,
                **anywhere,
            )
        )
    for beta, loss, mode in ((0.0, "full KL", "KL"), (0.5, "full JSD", "JSD")):
        make = liger_jsd(beta)
        rows.append(Contestant(BOTH_HEADS, "Liger fused linear JSD", mode, loss, make, BACKWARD, mean=True, **on_gpu))
    rows.append(
        Contestant(
            STUDENT,
            "Liger fused linear KL",
            "target: whole distribution",
            "full KL",
            liger_kl_div,
            BACKWARD,
            needs="teacher_probs",
            **on_gpu,
        )
    )
    return rows


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
