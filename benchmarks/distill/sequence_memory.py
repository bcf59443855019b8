"""Peak memory per rank of one training step on a long sequence, shared by 1, 2 or 4 ranks, on a CPU with gloo.

    python benchmarks/distill/sequence_memory.py --model FOLDER --seq-len 8192 --ranks 1 2 4

Every rank loads the model in bf16, then runs forward, sparse KL (top 64 of random targets) and backward of one sequence
of two packed documents, while a thread reads /proc/self/status. The figure leaves out the loaded model: it is made of
activations, the loss's workspace and the gradients, which are as large on every rank and have a column.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from rank_processes import SOURCES, MemoryWatch, run_ranks

sys.path[:0] = SOURCES


def one_rank(folder: Path, length: int) -> None:
    import torch
    import torch.distributed as dist

    from kdscale.config.distill.objectives import TokenDivergenceConfig
    from kdscale.distill.objectives.base import Objectives
    from kdscale.distill.parallel.checks import check_sequence_parallel
    from kdscale.distill.step import StudentModule
    from kdscale.models.loading import load_model
    from kdscale.models.sequence_parallel import SequenceSlice
    from kdscale.teacher.source import MicroBatch
    from kdscale.teacher.targets import Targets, TopKTargets

    torch.set_num_threads(1)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    check_sequence_parallel(ranks, length, {"model": folder})
    dist.init_process_group("gloo")
    dist.all_reduce(torch.zeros(1))
    model = load_model(folder, dtype=torch.bfloat16, device=torch.device("cpu")).train()
    sequence_slice = SequenceSlice(rank, ranks, dist.group.WORLD) if ranks > 1 else SequenceSlice()
    sequence_slice.prepare(model)
    vocab, own = model.config.vocab_size, length // ranks
    student = StudentModule(model, Objectives([TokenDivergenceConfig()]), vocab, sequence_slice=sequence_slice)
    gen = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, vocab, (1, length), generator=gen)
    position_BS = torch.arange(length)[None] % (length // 2 + 100)
    rows_N = torch.arange(rank * own, (rank + 1) * own)
    logits_NK = torch.randn(length, 64, generator=gen).sort(1, descending=True).values[rows_N]
    ids_NK = (torch.randint(0, vocab // 64, (length, 64), generator=gen) * 64 + torch.arange(64))[rows_N]
    top_k = TopKTargets(ids_NK, logits_NK, logits_NK.logsumexp(1) + 0.3, 1.0, vocab)
    targets = Targets(rows=len(ids_NK), top_k=top_k)
    watch = MemoryWatch()
    watch.start()
    began = time.perf_counter()
    (loss_sum,), _ = student(MicroBatch(ids_BS, position_BS, rows_N, ids_BS[0, rows_N]), targets)
    (loss_sum / length).backward()
    seconds = time.perf_counter() - began
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    loss = torch.tensor(float(loss_sum.detach()), dtype=torch.float64)
    dist.all_reduce(loss)
    peak = watch.finish()["anonymous"]
    print(json.dumps({"peak": peak, "gradients": gradients, "seconds": seconds, "loss": float(loss)}), flush=True)
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--one-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_rank:
        one_rank(args.model, args.seq_len)
        return
    print("| ranks | MB per rank beyond the model | of which gradients | seconds | loss sum |")
    print("|---|---|---|---|---|")
    for ranks in args.ranks:
        rows = run_ranks([__file__, "--one-rank", "--model", str(args.model), "--seq-len", str(args.seq_len)], ranks)
        most = {name: max(row[name] for row in rows) for name in rows[0]}
        sizes = f"{most['peak'] / 1e6:.0f} | {most['gradients'] / 1e6:.0f}"
        print(f"| {ranks} | {sizes} | {most['seconds']:.1f} | {most['loss']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
