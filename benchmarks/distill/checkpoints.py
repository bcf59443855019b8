"""What checkpoints cost: `export` measures kdscale export of a made-up checkpoint, `stall` what a save costs training.

    python benchmarks/distill/checkpoints.py export --work /tmp/c --gigabytes 1 --ranks 4
    python benchmarks/distill/checkpoints.py stall --work /tmp/c --model DIR

`export` makes a student of that size (fp32) and a checkpoint of it, cut at random places and spread over the ranks. It
exports the student in another process and prints the peak resident memory of that process. `stall` times `Saver.save`
on the spot and in the background (the first save allocates the copy) and DeepSpeed's engine.save_checkpoint on the same
engine; fsync and hashing, which DeepSpeed leaves out, are counted apart. Each is done twice, in turn, and shown as
[wall seconds, CPU seconds of the training thread].
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdscale.config.load import build_config, dump_config
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint.rank_files import QUANTITIES, write_rank_file
from kdscale.files import fsync_file, sha256_file
from kdscale.models.parameter_map import ParameterRange
from kdscale.weights import ShardWriter, TensorInfo

ROWS, COLUMNS = 8192, 4096  # of a tensor: 128 MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("export", "stall", "export-child"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--model", type=Path, help="of stall: a checkpoint folder, trained in bf16 at ZeRO 1")
    arguments = parser.parse_args()
    {"export": export, "stall": stall, "export-child": export_child}[arguments.what](arguments)


def export(arguments: argparse.Namespace) -> None:
    run = arguments.work / "run"
    make_run(run, int(arguments.gigabytes * 1e9 / (4 * ROWS * COLUMNS)) or 1, arguments.ranks)
    command = [sys.executable, __file__, "export-child", "--work", str(arguments.work)]
    print(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout, end="")


def export_child(arguments: argparse.Namespace) -> None:
    from kdscale.distill.export import export_run
    from kdscale.runtime.progress import Reporter

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    out = export_run(arguments.work / "run", None, arguments.work / "out", Reporter(quiet=True))
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(item.stat().st_size for item in out.glob("*.safetensors"))
    print(json.dumps({"student_MB": size // 10**6, "seconds": round(seconds, 1), "imports_MB": before * 1024 // 10**6,
                      "peak_rss_MB": peak * 1024 // 10**6}))  # fmt: skip


def make_run(run: Path, tensors: int, ranks: int) -> None:
    """Make a run folder with a pruned student of zeros and one checkpoint of random ranges."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (ROWS, COLUMNS) for i in range(tensors)}
    (run / "pruned").mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": tensors, "intermediate_size": ROWS, "hidden_size": COLUMNS,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
    (run / "pruned" / "config.json").write_text(json.dumps(config))
    with ShardWriter(run / "pruned", {name: TensorInfo(shape, "F32") for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            writer.add(name, torch.zeros(shape))
    tree = {"name": "made-up", "run_dir": str(run), "teacher": {"path": "none"}, "prune": {"ffn": 64}}
    (run / "config.yaml").write_text(dump_config(build_config(tree, "benchmark")))
    rng, held = random.Random(0), [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    for name in shapes:
        cuts = sorted([0, ROWS * COLUMNS, *(rng.randrange(1, ROWS * COLUMNS) for _ in range(7))])
        for begin, end in itertools.pairwise(cuts):
            rng.choice(held).append(ParameterRange(name, begin, end - begin))
    folder = run / "checkpoints"
    tmp = checkpoint_folder.partial_dir(folder, 1)
    tmp.mkdir(parents=True)
    entries = {}
    for number, ranges in enumerate(held):
        if ranges:
            written = write_rank_file(tmp / checkpoint_folder.rank_file(number), ranges, values(ranges))
            entries[checkpoint_folder.rank_file(number)] = vars(written)
    fingerprint = {"distill": {"dtype": "float32"}, "student": {"config": sha256_file(run / "pruned" / "config.json")}}
    own = {"state": {"guard": {"total": 0}}, "adam_step": 1, "ranks": ranks, "parameters": shapes, "tied": {}}
    checkpoint_folder.seal(folder, 1, {"fingerprint": fingerprint, **own, "files": entries})


def values(ranges: list[ParameterRange]) -> Iterator[torch.Tensor]:
    for _ in QUANTITIES:
        for span in ranges:
            yield torch.rand(span.length)


class Student(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits.float().logsumexp(-1).mean()  # type: ignore[no-any-return]


def stall(arguments: argparse.Namespace) -> None:
    from kdscale.distill.checkpoint.saver import SavePolicy, Saver
    from kdscale.distill.checkpoint.zero_state import ZeroState
    from kdscale.distill.engine import make_engine
    from kdscale.distill.parallel.deepspeed_config import deepspeed_config
    from kdscale.distill.parallel.process_group import join_group
    from kdscale.models.loading import load_model

    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    join_group(cpu)
    student = Student(load_model(arguments.model, dtype=torch.bfloat16, device=cpu).requires_grad_(True))
    tree = {"name": "made-up", "run_dir": "none", "teacher": {"path": "none"}, "prune": {"ffn": 64},
            "distill": {"global_batch": 1, "micro_batch": 1}}  # fmt: skip
    cfg = build_config(tree, "benchmark")
    zero = deepspeed_config(cfg.distill, 1, bf16=True, device="cpu")
    engine = make_engine(cfg, student, 1, zero, None)  # type: ignore[arg-type]

    def train() -> float:
        began = time.perf_counter()
        engine.backward(engine(torch.arange(512)[None]))
        engine.step()
        return time.perf_counter() - began

    train()
    results: dict[str, Any] = {"parameters": sum(p.numel() for p in student.parameters()), "step": round(train(), 2)}
    zero_state = ZeroState(engine, student.model)
    savers = {
        name: Saver(arguments.work / name, zero_state, {}, SavePolicy(1, background=name == "background"), cpu)
        for name in ("spot", "background")
    }
    for step in range(1, 3):  # in turn, so that other work on the machine disturbs all alike
        for name, saver in savers.items():
            began = now()
            saver.save(step, {}, wait=False)
            note(results, f"{name}: stall", began)
            saver.finish()
            results[f"{name}: MB"] = megabytes(checkpoint_folder.step_dir(arguments.work / name, step))
        began = now()
        engine.save_checkpoint(str(arguments.work / "deepspeed"), tag="it", save_latest=False)
        note(results, "deepspeed: stall", began)
        began = now()
        for item in (arguments.work / "deepspeed").rglob("*"):
            if item.is_file():
                fsync_file(item)
                sha256_file(item)
        note(results, "deepspeed: fsync and hash", began)
        results["deepspeed: MB"] = megabytes(arguments.work / "deepspeed")
    print(json.dumps(results))


def now() -> tuple[float, float]:
    """Wall clock, and CPU time of this thread, which hardly depends on what else the machine does."""
    return time.perf_counter(), time.thread_time()


def note(results: dict[str, Any], name: str, began: tuple[float, float]) -> None:
    results.setdefault(name, []).append([round(end - start, 2) for start, end in zip(began, now(), strict=True)])


def megabytes(folder: Path) -> int:
    return sum(item.stat().st_size for item in folder.rglob("*") if item.is_file()) // 10**6


if __name__ == "__main__":
    main()
