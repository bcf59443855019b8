"""Does training take the memory that `kdscale plan-cluster` predicts? Measured on CPU processes.

    python benchmarks/distill/plan_cluster_check.py [--only NAME ...] [--moments]

Each case starts its ranks over gloo, builds a teacher and a student of random weights, trains a few steps through the
same teacher, student module, optimiser and DeepSpeed engine as a run, and compares the peak of the process's anonymous
resident memory, beyond what it held after all imports, with kdscale.sizing.memory. It prints one line per case, and
exits with 1 when an error is larger than --tolerance. `MALLOC_MMAP_THRESHOLD_` is set for the ranks, so that freed
tensors go back to the system and a peak is what tensors took.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from typing import Any

from rank_processes import memory_in_use, run_ranks

STUDENT = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
           "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": False}  # fmt: skip
TEACHER = {**STUDENT, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8,
           "num_key_value_heads": 4}  # fmt: skip
# stage, ranks, dtype, and what differs from micro_batch 1, accumulation 2, 512 positions, no recompute
CASES: dict[str, dict[str, Any]] = {
    "stage 1, 1 rank": {"stage": 1, "ranks": 1},
    "stage 2, 1 rank": {"stage": 2, "ranks": 1},
    "stage 3, 1 rank": {"stage": 3, "ranks": 1},
    "stage 1, 2 ranks": {"stage": 1, "ranks": 2},
    "stage 2, 2 ranks": {"stage": 2, "ranks": 2},
    "stage 3, 2 ranks": {"stage": 3, "ranks": 2},
    "stage 0, fp32, 1 rank": {"stage": 0, "ranks": 1, "dtype": "float32"},
    "stage 2, fp32, 1 rank": {"stage": 2, "ranks": 1, "dtype": "float32"},
    "stage 1, 1 rank, no accumulation": {"stage": 1, "ranks": 1, "accumulation": 1},
    "stage 2, 2 ranks, 2,048 tokens": {"stage": 2, "ranks": 2, "micro_batch": 4},
    "the same, selective": {"stage": 2, "ranks": 2, "micro_batch": 4, "recompute": "selective"},
    "the same, keep_attention": {"stage": 2, "ranks": 2, "micro_batch": 4, "recompute": "keep_attention"},
    "the same, full": {"stage": 2, "ranks": 2, "micro_batch": 4, "recompute": "full"},
    "stage 1, 1 rank, Adam offloaded": {"stage": 1, "ranks": 1, "offload": True},
    "stage 2, 1 rank, Adam offloaded": {"stage": 2, "ranks": 1, "offload": True},
    "stage 3, 1 rank, Adam offloaded": {"stage": 3, "ranks": 1, "offload": True},
    "stage 1, 2 ranks, gradients in bf16": {"stage": 1, "ranks": 2, "gradient_bytes": 2},
    "stage 2, 2 ranks, gradients in bf16": {"stage": 2, "ranks": 2, "gradient_bytes": 2},
    "stage 3, 2 ranks, gradients in bf16": {"stage": 3, "ranks": 2, "gradient_bytes": 2},
}
DEFAULTS = {"micro_batch": 1, "accumulation": 2, "seq_len": 512, "dtype": "bfloat16", "recompute": "off"}


def main() -> int:
    arguments = parse()
    if arguments.child:
        child(json.loads(arguments.child))
        return 0
    chosen = {name: case for name, case in CASES.items() if not arguments.only or name in arguments.only}
    worst = 0.0
    print(f"{'case':38} {'predicted':>9} {'measured':>9} {'error':>7}  at")
    for name, case in chosen.items():
        full = {**DEFAULTS, **case, "steps": arguments.steps}
        predicted, moment, components = predict(full)
        ranks = run_ranks(
            [__file__, "--child", json.dumps(full)], full["ranks"],
            OMP_WAIT_POLICY="passive", MALLOC_MMAP_THRESHOLD_="65536",
        )  # fmt: skip
        measured = max(row["peak"] for row in ranks)
        error = predicted / measured - 1
        worst = max(worst, abs(error))
        print(f"{name:38} {predicted / 1e6:6.0f} MB {measured / 1e6:6.0f} MB {error:+7.1%}  {moment}", flush=True)
        if arguments.moments:
            print("   predicted", {key: round(value / 1e6) for key, value in components.items()})
            print("   measured ", {key: round(value / 1e6) for key, value in ranks[0]["moments"].items()}, flush=True)
    print(f"largest error {worst:.1%}")
    return int(worst > arguments.tolerance)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--moments", action="store_true", help="show components and the peak of each part of a step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def shape(sizes: dict[str, Any]) -> Any:
    from kdscale.families import load_family
    from kdscale.sizing.model_shape import ModelShape

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    return ModelShape.of(config, load_family(config, "benchmark"))


def predict(case: dict[str, Any]) -> tuple[float, str, dict[str, float]]:
    from kdscale.config.distill.recompute import RECOMPUTE
    from kdscale.distill.parallel.deepspeed_config import BUCKET
    from kdscale.sizing import memory
    from kdscale.sizing.job import Job, Setting

    job = Job(
        shape(STUDENT), shape(TEACHER), seq_len=case["seq_len"], ranks=case["ranks"], ranks_per_node=case["ranks"],
        item_bytes=2 if case["dtype"] == "bfloat16" else 4, gradient_bytes=case.get("gradient_bytes", 4),
        reduce_bucket=BUCKET["cpu"], device="cpu",
    )  # fmt: skip
    setting = Setting(
        case["stage"], case["micro_batch"], case["accumulation"], RECOMPUTE[case["recompute"]], "replicated",
        offload_optimizer=case.get("offload", False),
    )  # fmt: skip
    peak = memory.peak_memory(job, setting)
    # a CPU rank's memory is the host's
    return peak.total + peak.host, peak.moment, {**peak.parts, "host": peak.host}


class Peaks:
    """The largest anonymous memory during each moment of a step, sampled every two milliseconds."""

    def __init__(self) -> None:
        self.largest: dict[str, int] = {}
        self.moment: str | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            moment, now = self.moment, memory_in_use()["anonymous"]
            if moment is not None:
                self.largest[moment] = max(self.largest.get(moment, 0), now)
            time.sleep(0.002)


def child(case: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kdscale.config.distill.recompute import RECOMPUTE
    from kdscale.config.distill.targets import Needs
    from kdscale.config.load import build_config
    from kdscale.data.batches import Batch
    from kdscale.distill.engine import make_engine
    from kdscale.distill.layers.recompute import recompute_in_backward
    from kdscale.distill.objectives.base import Objectives
    from kdscale.distill.parallel.deepspeed_config import deepspeed_config
    from kdscale.distill.parallel.process_group import join_group, leave_group
    from kdscale.distill.step import StudentModule, to_device
    from kdscale.models.attention import attend_within_documents
    from kdscale.teacher.online import OnlineTeacher
    from kdscale.teacher.placement.placed import ReplicatedTeacher

    device, dtype = torch.device("cpu"), getattr(torch, case["dtype"])
    settings = {
        "seq_len": case["seq_len"], "micro_batch": case["micro_batch"], "processes": case["ranks"],
        "global_batch": case["micro_batch"] * case["ranks"] * case["accumulation"], "zero_stage": case["stage"],
        "zero": {
            "offload_optimizer": "cpu" if case.get("offload") else "none",
            "gradient_dtype": "bfloat16" if case.get("gradient_bytes") == 2 else "float32",
        },
    }  # fmt: skip
    tree = {"name": "b", "run_dir": "b", "teacher": {"path": "b"}, "prune": {"ffn": 8}, "distill": settings}
    cfg = build_config(tree, "benchmark")
    join_group(device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warm = torch.nn.Linear(64, 64, dtype=dtype)  # the thread pools and oneDNN's own buffers
    warm(torch.ones(8, 64, dtype=dtype)).sum().backward()
    baseline = memory_in_use()["anonymous"]

    models = [LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype) for sizes in (TEACHER, STUDENT)]
    teacher = OnlineTeacher(ReplicatedTeacher(models[0]), Needs(top_k=64), vocab_size=STUDENT["vocab_size"])
    attend_within_documents(models[0])
    attend_within_documents(models[1])
    recompute_in_backward(models[1], RECOMPUTE[case["recompute"]])
    student = StudentModule(models[1].train(), Objectives(cfg.distill.objectives), STUDENT["vocab_size"])
    models.clear()
    zero = deepspeed_config(cfg.distill, case["stage"], bf16=dtype == torch.bfloat16, device="cpu")
    engine = make_engine(cfg, student, case["stage"], zero, None)
    shape = (case["micro_batch"], case["seq_len"])
    positions = (torch.arange(case["seq_len"]) % (case["seq_len"] // 2)).expand(shape)  # two documents a sequence
    peaks = Peaks()
    for _ in range(case["steps"]):
        for _ in range(case["accumulation"]):
            ids = torch.randint(0, STUDENT["vocab_size"], shape)
            micro_batch = to_device(Batch(ids, positions, ids.roll(-1, 1), torch.zeros_like(ids), []), device)
            peaks.moment = "teacher"
            targets = teacher.targets(micro_batch)
            peaks.moment = "student"
            (loss,), _ = engine(micro_batch, targets)
            peaks.moment = "backward"
            engine.backward(loss / ids.numel(), scale_wrt_gas=False)
            del loss, targets
            peaks.moment = "step"
            engine.step()
    peaks.moment = None
    moments = {name: size - baseline for name, size in peaks.largest.items()}
    print(json.dumps({"peak": max(moments.values()), "moments": moments}), flush=True)
    leave_group()
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
