"""linear_sparse_kl on a CPU against eager torch (and Liger's chunked JSD where installed): time and peak memory.

    PYTHONPATH=.:kernels OMP_NUM_THREADS=2 python benchmarks/kernels/cpu_sparse_kl.py
    PYTHONPATH=.:kernels OMP_NUM_THREADS=2 python benchmarks/kernels/cpu_sparse_kl.py --accuracy

One row a measurement, as JSON. Times are forward plus backward; the contestants take turns, so that a busy machine
slows all of them, and the ratio is the median over rounds. Peak memory is the growth of a fresh process's resident
set over its inputs. Liger gets the teacher's hidden states and head (its loss needs them), hence one product more.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import kdscale_kernels as kk
from kdscale_kernels import reference


def problem(n: int, h: int, v: int, k: int, dtype: torch.dtype, noise: float = 0.3) -> dict[str, torch.Tensor]:
    """A matched pair: the student's hidden states are the teacher's plus noise, the head is shared."""
    gen = torch.Generator().manual_seed(0)
    weight = (torch.randn(v, h, generator=gen) * 4.0 / h**0.5).to(dtype)
    teacher = torch.randn(n, h, generator=gen).to(dtype)
    hidden = (teacher.float() + noise * torch.randn(n, h, generator=gen)).to(dtype)
    top = kk.linear_topk_lse(teacher, weight, k)
    labels = torch.randint(0, v, (n,), generator=gen)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "teacher": teacher,
        "labels": labels,
        "ids": top.ids_NK,
        "logits": top.logits_NK,
        "lse": top.lse_N,
    }


def ours(p: dict[str, torch.Tensor]) -> None:
    args = (p["hidden"], p["weight"], p["ids"], p["logits"], p["lse"])
    kk.linear_sparse_kl(*args, labels_N=p["labels"]).loss_sum.backward()


def eager(p: dict[str, torch.Tensor]) -> None:
    """The same loss as most loops write it: whole logits in the model's dtype, log-softmax in fp32, gather."""
    logq = F.linear(p["hidden"], p["weight"]).float().log_softmax(1)
    logp = p["logits"] - p["lse"][:, None]
    q_s = logq.gather(1, p["ids"])
    p_tail = (1 - logp.exp().sum(1)).clamp(min=1e-9)
    q_tail = (1 - q_s.exp().sum(1)).clamp(min=1e-9)
    loss = (logp.exp() * (logp - q_s)).sum() + (p_tail * (p_tail.log() - q_tail.log())).sum()
    loss.backward()


def liger(p: dict[str, torch.Tensor]) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    loss(p["hidden"], p["weight"], p["teacher"], p["weight"].detach(), p["labels"]).backward()


def contestants() -> dict[str, Callable[[dict[str, torch.Tensor]], None]]:
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError:
        return {"ours": ours, "eager": eager}
    return {"ours": ours, "eager": eager, "liger": liger}


def accuracy() -> None:
    """Relative error of dX and dW (Frobenius) against fp64, bf16 weights, N=64 H=576 V=8192 K=64."""
    for noise in (0.3, 0.05):
        p = problem(64, 576, 8192, 64, torch.bfloat16, noise)
        hidden, weight = (p[n].detach().double().requires_grad_() for n in ("hidden", "weight"))
        targets = (p["ids"], p["logits"].double(), p["lse"].double())
        reference.linear_sparse_kl(hidden, weight, *targets, labels_N=p["labels"]).loss_sum.backward()
        for name, step in (("ours", ours), ("eager bf16 logits", eager)):
            p["hidden"].grad = p["weight"].grad = None
            step(p)
            row = {"noise": noise, "what": name}
            for key, want in (("hidden", hidden.grad), ("weight", weight.grad)):
                row[f"error_{key}"] = float(f"{((p[key].grad.double() - want).norm() / want.norm()).item():.2g}")
            print(json.dumps(row))


def status_mib(field: str) -> float:
    """A memory figure of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=(2048, 576, 49152, 64), metavar=("N", "H", "V", "K"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accuracy", action="store_true", help="gradient errors against fp64 instead of times")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.accuracy:
        accuracy()
        return
    dtype, steps = getattr(torch, args.dtype), contestants()
    p = problem(*args.shape, dtype)
    if args.peak_of:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the inputs
        before = status_mib("VmRSS")
        steps[args.peak_of](p)
        print(status_mib("VmHWM") - before)
        return
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, step in steps.items():
            p["hidden"].grad = p["weight"].grad = None
            start = time.perf_counter()
            step(p)
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        command = [sys.executable, __file__, "--peak-of", name, "--dtype", args.dtype, "--shape"]
        peak = subprocess.run([*command, *map(str, args.shape)], check=True, capture_output=True, text=True).stdout
        ratios = [t / o for t, o in zip(seconds[1:], times["ours"][1:], strict=True)]
        row = {"what": name, "shape_NHVK": list(args.shape), "dtype": args.dtype, "threads": torch.get_num_threads()}
        row |= {"seconds_median": round(statistics.median(seconds[1:]), 3), "seconds_min": round(min(seconds[1:]), 3)}
        row |= {"times_ours_median": round(statistics.median(ratios), 2), "peak_mib_beyond_inputs": round(float(peak))}
        print(json.dumps(row | {"torch": torch.__version__, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
