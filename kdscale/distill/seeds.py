"""Random numbers of a training step: seeded by (seed, step, rank), so that no generator's state has to be saved.

A step draws the same numbers (dropout, where a model has it) in an unbroken run, after a resume and when it is run
again alone. With another number of ranks the sequences of a step meet other numbers, in a defined way.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch (every device), Python and NumPy for optimiser step `step` on `rank`."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    random.seed(int.from_bytes(digest[8:16], "little"))
    np.random.seed(int.from_bytes(digest[16:20], "little"))
