"""One rank of the ZeRO-3 test: python zero3_worker.py RANK WORLD STORE RESULTS. Also imported for the plain run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kdscale_kernels as kk

CASES: dict[str, dict[str, Any]] = {
    "head": {},
    "checkpointed": {"checkpointed": True},
    "frozen": {"frozen": True},
    "gathered": {"gathered": True},
}
WORLD, MICROS, ROWS, VOCAB = 2, 2, 6, 203


class DistillHead(nn.Linear):
    """A head that takes the targets: the loss is made where ZeRO-3 has gathered the weight."""

    def forward(self, hidden, labels, ids, logits, lse):  # type: ignore[override]
        return kk.linear_sparse_kl(hidden, self.weight, ids, logits, lse, labels_N=labels, ce_weight=0.3).loss_sum


class Student(nn.Module):
    def __init__(self, *, frozen=False, checkpointed=False, gathered=False):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24))
        self.lm_head = DistillHead(24, VOCAB, bias=False)
        self.lm_head.requires_grad_(not frozen)
        self.checkpointed, self.gathered = checkpointed, gathered

    def forward(self, x, *rest):
        hidden = self.body(x)
        if self.gathered:
            return hidden
        if self.checkpointed:
            return checkpoint(self.lm_head, hidden, *rest, use_reentrant=False)
        return self.lm_head(hidden, *rest)


def micro_batch(index: int) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(index)
    teacher = kk.linear_topk_lse(torch.randn(ROWS, 8, generator=gen), torch.randn(VOCAB, 8, generator=gen), 5)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=gen)
    labels[index % ROWS] = -100
    return torch.randn(ROWS, 10, generator=gen), labels, *teacher


def zero3_gradients(rank: int, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    student = Student(**case)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICROS,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 100_000,
            "allgather_bucket_size": 100_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    head = student.lm_head.weight
    assert head.numel() == 0, "the head should be in pieces between uses"
    for step in range(MICROS):
        x, labels, *targets = micro_batch(rank * MICROS + step)
        if case.get("gathered"):
            hidden = engine(x)
            with deepspeed.zero.GatheredParameters([head]):
                loss = kk.linear_sparse_kl(hidden, head, *targets, labels_N=labels, ce_weight=0.3).loss_sum
                engine.backward(loss)
        else:
            engine.backward(engine(x, labels, *targets))
        if step + 1 < MICROS:
            engine.step()
    found = {name: safe_get_full_grad(p) for name, p in student.named_parameters() if p.requires_grad}
    assert head.numel() == 0, "the head should be in pieces again"
    # DeepSpeed divides by the accumulation steps and averages over ranks
    return {name: grad.detach().clone() * (MICROS * WORLD) for name, grad in found.items() if grad is not None}


def main() -> None:
    rank, store, results = int(sys.argv[1]), sys.argv[3], Path(sys.argv[4])
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    import deepspeed
    import torch.distributed as dist
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile an extension
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    torch.save({name: zero3_gradients(rank, case) for name, case in CASES.items()}, results / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
