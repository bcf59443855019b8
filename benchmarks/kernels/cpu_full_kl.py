"""linear_full_kl on a CPU against eager torch: time, peak memory, gradient errors.

    PYTHONPATH=.:kernels OMP_NUM_THREADS=1 python benchmarks/kernels/cpu_full_kl.py [--divergence jsd]
    PYTHONPATH=.:kernels OMP_NUM_THREADS=1 python benchmarks/kernels/cpu_full_kl.py --accuracy

As cpu_sparse_kl.py: JSON rows, forward plus backward, contestants in turns, the ratio a median over rounds, and peak
memory the growth of a fresh process's resident set over its inputs. The teacher's product is part of both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cpu_sparse_kl import problem, status_mib
from torch import Tensor

import kdscale_kernels as kk
from kdscale_kernels import reference
from kdscale_kernels.types import Divergence

DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl")


def ours(p: dict[str, Tensor], divergence: Divergence) -> None:
    args = (p["hidden"], p["weight"], p["teacher"], p["weight"].detach())
    kk.linear_full_kl(*args, labels_N=p["labels"], divergence=divergence).loss_sum.backward()


def eager(p: dict[str, Tensor], divergence: Divergence) -> None:
    """As most loops write it: whole logits in the model's dtype, log-softmax in fp32 (forward KL and JSD)."""
    logq = F.linear(p["hidden"], p["weight"]).float().log_softmax(1)
    logp = F.linear(p["teacher"], p["weight"].detach()).float().log_softmax(1)
    if divergence == "forward_kl":
        F.kl_div(logq, logp, log_target=True, reduction="sum").backward()
        return
    if divergence == "reverse_kl":
        F.kl_div(logp, logq, log_target=True, reduction="sum").backward()
        return
    if divergence != "jsd":
        raise SystemExit("expected --divergence forward_kl, reverse_kl or jsd: eager torch is written for these")
    half = torch.tensor(0.5).log()
    logm = torch.logaddexp(logp + half, logq + half)
    loss = F.kl_div(logm, logp, log_target=True, reduction="sum") + F.kl_div(
        logm, logq, log_target=True, reduction="sum"
    )
    (0.5 * loss).backward()


STEPS = {"ours": ours, "eager": eager}


def accuracy() -> None:
    """Relative error of dX and dW (Frobenius) against fp64, bf16 weights, N=64 H=576 V=8192."""
    for noise in (0.3, 0.05):
        for divergence, (name, step) in ((d, s) for d in DIVERGENCES for s in STEPS.items()):
            if name == "eager" and divergence.startswith("skewed"):
                continue
            p = problem(64, 576, 8192, 1, torch.bfloat16, noise)
            wide = [p[n].detach().double().requires_grad_() for n in ("hidden", "weight")]
            teacher = (p["teacher"].double(), p["weight"].detach().double())
            truth = reference.linear_full_kl(*wide, *teacher, labels_N=p["labels"], divergence=divergence)
            truth.loss_sum.backward()
            step(p, divergence)
            row: dict[str, object] = {"noise": noise, "divergence": divergence, "what": name}
            for key, exact in zip(("hidden", "weight"), wide, strict=True):
                error = (p[key].grad.double() - exact.grad).norm() / exact.grad.norm()
                row[f"error_{key}"] = float(f"{error.item():.2g}")
            print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 576, 49152), metavar=("N", "H", "V"))
    parser.add_argument("--divergence", choices=("forward_kl", "reverse_kl", "jsd"), default="forward_kl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accuracy", action="store_true", help="gradient errors against fp64 instead of times")
    parser.add_argument("--peak-of", choices=tuple(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.accuracy:
        accuracy()
        return
    p = problem(*args.shape, 1, torch.bfloat16)
    if args.peak_of:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the inputs
        before = status_mib("VmRSS")
        STEPS[args.peak_of](p, args.divergence)
        print(status_mib("VmHWM") - before)
        return
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, step in STEPS.items():
            p["hidden"].grad = p["weight"].grad = None
            start = time.perf_counter()
            step(p, args.divergence)
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        command = [sys.executable, __file__, "--peak-of", name, "--divergence", args.divergence, "--shape"]
        peak = subprocess.run([*command, *map(str, args.shape)], check=True, capture_output=True, text=True).stdout
        ratios = [t / o for t, o in zip(seconds[1:], times["ours"][1:], strict=True)]
        row = {"what": name, "divergence": args.divergence, "shape_NHV": list(args.shape)}
        row |= {"threads": torch.get_num_threads(), "seconds_median": round(statistics.median(seconds[1:]), 2)}
        row |= {"times_ours_median": round(statistics.median(ratios), 2), "peak_mib_beyond_inputs": round(float(peak))}
        print(json.dumps(row | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
