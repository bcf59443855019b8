"""Time and peak memory of pruning a checkpoint of Llama-3.1-8B shapes to the published 4.5B width.

    python benchmarks/prune/make_llama_8b_shapes.py /tmp/teacher
    python benchmarks/prune/prune_8b.py /tmp/teacher --work /tmp/prune-8b copy        # apply alone against cp
    python benchmarks/prune/prune_8b.py /tmp/teacher --work /tmp/p stages  # importance, plan, compensate and apply
    python benchmarks/prune/prune_8b.py /tmp/teacher --work /tmp/prune-8b load  # the student in plain transformers

One JSON row per measurement on stdout. Every measured step is a process of its own, and its peak is the kernel's VmHWM,
which counts mapped file pages too. `copy` takes turns between apply, whose student it removes, and `cp` of each shard
followed by fsync, which apply does as well; it never has both on the disk. Both read files that were dropped from the
page cache before. `stages` leaves the student for `load`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

CUT = {"hidden": 3072, "ffn": 9216}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compensate", default="ridge", choices=["ridge", "two_stream"])
    parser.add_argument("what", choices=["copy", "stages", "load", *STEPS])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what == "copy":
        compare_with_cp(arguments)
    elif arguments.what == "stages":
        for step in ("importance", "plan", "compensated"):
            child(arguments, step)
    elif arguments.what == "load":
        child(arguments, "loaded")
    else:
        started = time.monotonic()
        facts = STEPS[arguments.what](arguments)
        row(arguments.what, time.monotonic() - started, peak_gib=peak_gib(), **facts)


def row(what: str, seconds: float, **facts: Any) -> None:
    print(json.dumps({"what": what, "seconds": round(seconds, 1), **facts}), flush=True)


def peak_gib() -> float:
    """The most memory this process ever had resident, from the kernel."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return round(int(line.split()[1]) / 2**20, 2)


def child(arguments: argparse.Namespace, step: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(arguments.teacher), "--work", str(arguments.work)]
    for name in ("tokens", "seq_len", "threads", "compensate"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run([*command, step], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", flush=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- apply against cp --------------------------------------------------------------------------------------------------


def compare_with_cp(arguments: argparse.Namespace) -> None:
    shards = sorted(arguments.teacher.glob("*.safetensors"))
    ratios = []
    for _ in range(arguments.repeats):
        evict(shards)
        applied = child(arguments, "sliced")
        shutil.rmtree(arguments.work / "sliced")
        evict(shards)
        copied, size = 0.0, 0
        for shard in shards:
            target = arguments.work / shard.name
            started = time.monotonic()
            subprocess.run(["cp", shard, target], check=True)
            subprocess.run(["sync", target], check=True)
            copied += time.monotonic() - started
            size += target.stat().st_size
            target.unlink()
        row("cp and sync", copied, bytes=size)
        ratios.append(applied["seconds"] / copied)
        same = applied["seconds"] / (copied * applied["bytes"] / size)
        row("ratio", 0, to_cp_of_the_teacher=round(ratios[-1], 2), to_cp_of_as_many_bytes_as_written=round(same, 2))
    row("ratio, median", 0, to_cp_of_the_teacher=round(float(np.median(ratios)), 2))


def evict(files: list[Path]) -> None:
    """Drop the files from the page cache, so that reading them means the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


# -- the steps, each in a process of its own ---------------------------------------------------------------------------


def sliced(arguments: argparse.Namespace) -> dict[str, Any]:
    """Apply without compensation; which units stay does not matter to the time, so the scores are random."""
    from kdscale.config.prune import PruneConfig
    from kdscale.prune.apply import apply_plan
    from kdscale.prune.search.planning import make_plan

    checkpoint, family = opened(arguments.teacher)
    config = PruneConfig(**CUT, compensate="none")
    dims, rng = family.dims(checkpoint.config), np.random.default_rng(0)
    scores = {
        "ffn.output_energy": rng.random((dims.layers, dims.ffn)).astype(np.float32),
        "hidden.activation": rng.random(dims.hidden).astype(np.float32),
    }
    out = arguments.work / "sliced"
    apply_plan(checkpoint, family, make_plan(checkpoint.config, family, scores, config), out, config)
    return {"bytes": sum(file.stat().st_size for file in out.glob("*.safetensors"))}


def importance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score all axes that the cut needs."""
    import torch

    from kdscale.config.prune import ImportanceConfig, PruneConfig
    from kdscale.prune.importance.collect import score_teacher
    from kdscale.runtime.progress import Reporter

    checkpoint, family = opened(arguments.teacher)
    torch.set_num_threads(arguments.threads)
    score_teacher(
        checkpoint, family, batches(arguments), ImportanceConfig(dtype="bfloat16"), PruneConfig(**CUT),
        arguments.work / "importance", torch.device("cpu"), Reporter(), scratch(arguments, "importance"),
    )  # fmt: skip
    return {"tokens": arguments.tokens}


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Choose the units that stay."""
    from kdscale.config.prune import PruneConfig
    from kdscale.prune.search.planning import make_plan
    from kdscale.runs.importance_scores import load_scores

    checkpoint, family = opened(arguments.teacher)
    config = PruneConfig(**CUT, compensate=arguments.compensate)
    pruning = make_plan(checkpoint.config, family, load_scores(arguments.work / "importance"), config)
    pruning.save(arguments.work / "plan.json")
    return {"parameters": pruning.student_params.total, "teacher_parameters": pruning.teacher_params.total}


def compensated(arguments: argparse.Namespace) -> dict[str, Any]:
    """Apply the plan with compensation."""
    import torch

    from kdscale.config.prune import PruneConfig
    from kdscale.prune.apply import apply_plan
    from kdscale.prune.plan import Plan
    from kdscale.runtime.progress import Reporter

    checkpoint, family = opened(arguments.teacher)
    torch.set_num_threads(arguments.threads)
    pruning = Plan.load(arguments.work / "plan.json", config=checkpoint.config, family=family)
    out = arguments.work / "student"
    apply_plan(
        checkpoint, family, pruning, out, PruneConfig(**CUT), batches=batches(arguments), dtype=torch.bfloat16,
        reporter=Reporter(), scratch=scratch(arguments, "prune"),
    )  # fmt: skip
    shutil.rmtree(arguments.work / "scratch")
    return {"tokens": arguments.tokens, "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors"))}


def loaded(arguments: argparse.Namespace) -> dict[str, Any]:
    """The student through plain transformers, which leaves the layers in the student's files until each is used."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = arguments.work / "student"
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{layer}": "disk" for layer in range(layers)}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map=places,
        offload_folder=arguments.work / "offload",
        output_loading_info=True,
    )
    with torch.inference_mode():
        logits = model(torch.arange(8)[None], use_cache=False).logits
    return {
        "parameters": model.num_parameters(),
        "complaints": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "finite": bool(torch.isfinite(logits).all()),
        "logits": list(logits.shape),
    }


STEPS = {"sliced": sliced, "importance": importance, "plan": plan, "compensated": compensated, "loaded": loaded}


def opened(folder: Path) -> tuple[Any, Any]:
    from kdscale.models.loading import open_teacher

    return open_teacher(folder)


def scratch(arguments: argparse.Namespace, name: str) -> Any:
    from kdscale.models.hidden_states import Scratch

    return Scratch(arguments.work / "scratch" / name)


def batches(arguments: argparse.Namespace) -> list[Any]:
    """Random tokens, one sequence per batch."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128_256, (arguments.tokens // arguments.seq_len, 1, arguments.seq_len), generator=generator)
    positions = torch.arange(arguments.seq_len)[None]
    return [SimpleNamespace(input_ids_BS=ids_1S, position_ids_BS=positions) for ids_1S in ids]


if __name__ == "__main__":
    main()
