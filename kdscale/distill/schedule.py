"""Steps, learning rate and seeds: pure functions of the step number, so that a resumed run is on the same schedule."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import torch

from kdscale.config.distill.settings import DistillConfig


def total_steps(tokens: int, seq_len: int, global_batch: int) -> int:
    """Optimiser steps in which the student sees at least `tokens` positions."""
    return max(1, math.ceil(tokens / (seq_len * global_batch)))


def shorter_phases(cfg: DistillConfig) -> list[tuple[int, int]]:
    """(first step after it, seq_len) of each phase of shorter sequences, in order."""
    steps = total_steps(cfg.tokens, cfg.seq_len, cfg.global_batch)
    return [(round(phase.until * steps), phase.seq_len) for phase in cfg.shorter_first]


def cosine_lr(step: int, *, steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of optimiser step `step` (counted from 0).

    Linear warm-up that reaches `lr` at step `warmup_steps` − 1 and never starts at zero, then a half cosine that ends
    at `min_lr` on the last step. A warm-up longer than the run is cut to half of it.
    """
    floor = min(min_lr, lr)
    warm = min(warmup_steps, steps // 2)
    if step < warm:
        return lr * (step + 1) / warm
    progress = min(1.0, (step - warm + 1) / max(1, steps - warm))
    return floor + (lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch (every device), Python and NumPy for optimiser step `step` on `rank`."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    random.seed(int.from_bytes(digest[8:16], "little"))
    np.random.seed(int.from_bytes(digest[16:20], "little"))
