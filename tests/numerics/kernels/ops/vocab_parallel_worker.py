"""One rank of the vocab-parallel tests: python vocab_parallel_worker.py RANK WORLD STORE CASES RESULTS DEVICE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import kdscale_kernels as kk


class Largest(TorchDispatchMode):
    """The largest array made, in numbers."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if torch.is_tensor(t)]
        self.numel = max([self.numel, *sizes])
        return out


def moved(value: Any, device: str) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if torch.is_tensor(leaf) else leaf, value)


def run_case(case: dict[str, Any], rank: int, group: Any) -> dict[str, Any]:
    span = slice(*case["spans"][rank])
    hidden = case["hidden"].clone().requires_grad_(case.get("grad_hidden", True))
    weight = case["weight"][span].clone().requires_grad_(not case.get("frozen", False))
    bias = None if case["bias"] is None else case["bias"][span].clone().requires_grad_()
    shard = {"first_id": span.start, "vocab_size": case["vocab_size"], "group": group, "bias_Vs": bias}
    shard |= {"chunk_bytes": case["chunk_bytes"], "backend": case.get("backend", "auto")}
    shard |= case.get("by_rank", {}).get(rank, {})
    if "k" in case:
        with torch.no_grad():
            return {"top": tuple(kk.vocab_parallel_topk_lse(hidden, weight, case["k"], **shard, **case["options"]))}

    def loss_of(h, w):
        return kk.vocab_parallel_sparse_kl(h, w, *case["targets"], labels_N=case["labels"], **shard, **case["options"])

    if case.get("checkpointed"):
        loss = checkpoint(lambda h, w: loss_of(h, w).loss_sum, hidden, weight, use_reentrant=False)
        sums = {}
    else:
        result = loss_of(hidden, weight)
        loss, sums = result.loss_sum, {k: v.detach() for k, v in vars(result).items()}
    if loss.requires_grad:
        (loss * 0.37).backward()
    return {"sums": sums, "grads": [None if t is None else t.grad for t in (hidden, weight, bias)]}


def attempt(case: dict[str, Any], rank: int, group: Any) -> dict[str, Any]:
    try:
        with Largest() as largest:
            found = run_case(case, rank, group)
    except (ValueError, kk.BackendUnavailableError) as error:
        return {"error": str(error)}
    return found | {"largest": largest.numel}


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    store = dist.FileStore(sys.argv[3], world)
    device = f"cuda:{rank}" if sys.argv[6] == "cuda" else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=rank, world_size=world)
    cases = moved(torch.load(sys.argv[4], weights_only=False), device)
    # ranks of the group are not the ranks of the world
    pair = dist.new_group([1, 3]) if world == 4 and device == "cpu" else None
    results = {}
    for name, case in cases.items():
        if len(case["spans"]) == world:
            results[name] = attempt(case, rank, None)
        elif pair is not None and rank in (1, 3):
            results[name] = attempt(case, dist.get_rank(pair), pair)
    dist.barrier()
    torch.save(moved(results, "cpu"), Path(sys.argv[5]) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
