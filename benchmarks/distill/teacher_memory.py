"""Peak memory per rank of a placed teacher, on a CPU with gloo: makes random teachers and measures fresh processes.

    python benchmarks/distill/teacher_memory.py --work /tmp/teacher-memory
    python benchmarks/distill/teacher_memory.py --work ... --layers 8 --ranks 2 --placements partitioned deepspeed

The first makes the table of docs/explanation/measured-distillation.md. Teachers are Llamas of hidden size 2048 in bf16:
8 layers are 1.0 GB, 16 are 1.8 GB, 262 MB of them embedding and head. Every rank loads, then runs `--forwards` forwards
of 64 tokens with the top 64 of the head, while a thread reads /proc/self/status. Figures leave out libraries and the
process group. `deepspeed` is DeepSpeed's way to load a frozen model with ZeRO-3 (HfDeepSpeedConfig, from_pretrained);
`student` only loads, as a ZeRO-3 student does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rank_processes import SOURCES, MemoryWatch, run_ranks

PLACEMENTS = ("replicated", "offloaded", "partitioned", "deepspeed", "student")
TOKENS, TOP_K = 64, 64


def make_teacher(folder: Path, layers: int) -> Path:
    """A Llama with random bf16 weights, written tensor by tensor."""
    import torch

    from kdscale.families import load_family
    from kdscale.weights import ShardWriter, TensorInfo

    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    out = folder / f"layers-{layers}"
    if (out / "config.json").exists():
        return out
    family = load_family(config, "config.json")
    specs = {name: TensorInfo(spec.shape, "BF16") for name, spec in family.tensors(config).items()}
    gen = torch.Generator().manual_seed(layers)
    with ShardWriter(out, specs, 500_000_000) as writer:
        for name, spec in specs.items():
            value = torch.empty(spec.shape).normal_(std=1 / math.sqrt(2048), generator=gen)
            writer.add(name, (value + 1 if "norm" in name else value).bfloat16())
    (out / "config.json").write_text(json.dumps(config))
    return out


def zero3_settings(world: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


def deepspeed_teacher(path: Path, settings: dict[str, Any]) -> Any:
    """The ZeRO-3 idiom: from_pretrained under HfDeepSpeedConfig, then an engine without an optimiser."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(settings)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    unset_hf_deepspeed_config()
    del kept
    engine, *_ = deepspeed.initialize(model=model.eval().requires_grad_(False), config=settings)
    return engine


def one_rank(path: Path, placement: str, forwards: int) -> None:
    import torch
    import torch.distributed as dist

    from kdscale.config.distill.targets import Needs
    from kdscale.models.head import final_hidden  # noqa: F401
    from kdscale.runtime.ranks import rank, world_size
    from kdscale.teacher.online import OnlineTeacher
    from kdscale.teacher.placement.placed import place_teacher
    from kdscale.teacher.source import MicroBatch

    torch.set_num_threads(1)
    if placement in ("deepspeed", "student"):
        import deepspeed
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    if placement in ("deepspeed", "student"):
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    dist.all_reduce(torch.zeros(1))
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    watch = MemoryWatch()
    watch.start()
    began, cpu = time.perf_counter(), time.process_time()
    if placement == "deepspeed":
        engine = deepspeed_teacher(path, zero3_settings(world_size()))
    elif placement == "student":
        from kdscale.distill.parallel.zero3_loading import load_zero3

        student = load_zero3(path, zero3_settings(world_size()), dtype=torch.bfloat16, device=torch.device("cpu"))
        assert not any(parameter.numel() for parameter in student.parameters())
        forwards = 0
    else:
        where: Any = placement
        placed = place_teacher(path, where, dtype=torch.bfloat16, device=torch.device("cpu"))
        teacher = OnlineTeacher(placed, Needs(top_k=TOP_K), vocab_size=placed.vocab)
    load = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    began, cpu = time.perf_counter(), time.process_time()
    for number in range(forwards):
        ids_BS = torch.randint(0, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(number))
        positions_BS = torch.arange(TOKENS)[None]
        if placement == "deepspeed":
            with torch.no_grad():
                logits = engine(input_ids=ids_BS, position_ids=positions_BS, use_cache=False).logits
            torch.topk(logits.float(), TOP_K)
            torch.logsumexp(logits.float(), -1)
        else:
            teacher.targets(MicroBatch(ids_BS, positions_BS, torch.arange(TOKENS), ids_BS[0]))
    count = max(1, forwards)
    forward = {"seconds": (time.perf_counter() - began) / count, "cpu": (time.process_time() - cpu) / count}
    dist.barrier()
    memory = {"rank": rank(), "base": sum(watch.base.values()), "peak": watch.finish()}
    print(json.dumps({**memory, "load": load, "forward": forward}), flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the teachers (3 GB for the default ones)")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS[:3]))
    parser.add_argument("--forwards", type=int, default=2)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of is not None:
        one_rank(args.rank_of, args.placements[0], args.forwards)
        return
    sys.path[:0] = SOURCES
    print("| placement | layers | ranks | anonymous MB | shared MB | files MB | load s, CPU s | forward s, CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for layers in args.layers:
        path = make_teacher(args.work, layers)
        for placement in args.placements:
            for ranks in args.ranks:
                command = [
                    __file__,
                    "--rank-of",
                    str(path),
                    "--placements",
                    placement,
                    "--forwards",
                    str(args.forwards),
                ]
                rows = run_ranks(command, ranks, HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
                most = {name: max(row["peak"][name] for row in rows) / 1e6 for name in rows[0]["peak"]}
                load, forward = ({key: max(row[phase][key] for row in rows) for key in ("seconds", "cpu")}
                                 for phase in ("load", "forward"))  # fmt: skip
                print(
                    f"| {placement} | {layers} | {ranks} | {most['anonymous']:.0f} | {most['shared']:.0f} "
                    f"| {most['files']:.0f} | {load['seconds']:.1f}, {load['cpu']:.1f} "
                    f"| {forward['seconds']:.2f}, {forward['cpu']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
