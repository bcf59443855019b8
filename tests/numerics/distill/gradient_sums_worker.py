"""What DeepSpeed adds up over micro-batches and ranks, beside fp64 sums of the same gradients.

`gradient_sums_worker.py FOLDER`: for each case and number of ranks a file CASE-RANKS.pt with the relative error of the
sum in each step, and that of the first step itself. With one rank there are two steps, to see whether anything is left
of the first. The same micro-batches are shared out over the ranks, so the sums of one and two ranks are of the same
gradients.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kdscale.config.load import build_config
from kdscale.distill.engine import make_engine
from kdscale.distill.parallel.deepspeed_config import deepspeed_config
from kdscale.distill.parallel.process_group import join_group
from tests.integration.forks import fork_ranks, import_engine

MICRO_BATCHES, TOKENS, V = 144, 16, 40
# stage, dtype, distill.zero
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "stage 0, fp32": (0, "float32", {}),
    "stage 1": (1, "bfloat16", {}),
    "stage 2": (2, "bfloat16", {}),
    "stage 3": (3, "bfloat16", {}),
    "stage 1, offloaded": (1, "bfloat16", {"offload_optimizer": "cpu"}),
    "stage 2, offloaded": (2, "bfloat16", {"offload_optimizer": "cpu"}),
    "stage 3, offloaded": (3, "bfloat16", {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    "stage 2, in bf16": (2, "bfloat16", {"gradient_dtype": "bfloat16"}),
}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(V, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(
            self.head(torch.tanh(self.inner(self.embed(ids)))).float(), (7 * ids + 3) % V, reduction="sum"
        )


def adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(grad: torch.Tensor) -> None:
        total.add_(grad)

    return add


def sums(case: str, world: int, rank: int) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    stage, dtype, zero = CASES[case]
    settings = {"zero_stage": stage, "processes": world, "micro_batch": 1, "global_batch": MICRO_BATCHES,
                "zero": {**zero, "reduce_bucket": 300, "allgather_bucket": 300}}  # fmt: skip
    cfg = build_config({"name": "t", "run_dir": "r", "teacher": {"path": "p"}, "prune": {"ffn": 8},
                        "distill": settings}, "test")  # fmt: skip
    torch.manual_seed(0)
    model: Any = Tied().to(getattr(torch, dtype))
    engine = make_engine(
        cfg, model, stage, deepspeed_config(cfg.distill, stage, bf16=dtype == "bfloat16", device="cpu"), None
    )
    wanted: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        wanted[name] = torch.zeros(getattr(parameter, "ds_shape", parameter.shape), dtype=torch.float64)
        parameter.register_hook(adder(wanted[name]))
    ids, errors, found = torch.Generator().manual_seed(5), [], []
    for _ in range(3 - world):
        for total in wanted.values():
            total.zero_()
        batches = torch.randint(V, (MICRO_BATCHES, TOKENS), generator=ids)[rank::world]
        for number, batch in enumerate(batches, 1):
            engine.backward(engine(batch) * (world / (MICRO_BATCHES * TOKENS)), scale_wrt_gas=False)
            if number == len(batches):
                own = [safe_get_full_grad(parameter) for parameter in model.parameters()]
                got = torch.cat([grad.double().reshape(-1) for grad in own])
                want = torch.cat([total.reshape(-1) for total in wanted.values()]) / world
                dist.all_reduce(want)
                errors.append(float((got - want).norm() / want.norm()))
                found.append(got)
            engine.step()
        norm = float(engine.get_global_grad_norm())
        assert abs(norm / float(want.norm()) - 1) < (1e-5 if "in bf16" not in case else 1e-2), (case, norm)
    return {"errors": errors, "sum": found[0]}


def work(folder: Path, world: int, rank: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    join_group(torch.device("cpu"))
    for case in CASES:
        found = sums(case, world, rank)
        if rank == 0:
            torch.save(found, folder / f"{case}-{world}.pt")
    dist.barrier()


if __name__ == "__main__":
    import_engine()
    place = Path(sys.argv[1])
    for ranks in (1, 2):
        if any(fork_ranks(ranks, lambda rank, ranks=ranks: work(place, ranks, rank))):
            sys.exit(1)
