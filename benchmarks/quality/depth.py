"""Students with fewer layers, before any training: one JSON row for each count, method and repair.

    python benchmarks/quality/depth.py TEACHER CORPUS --work DIR --seed 1 --layers 24 --layers 20

Rows go to DIR/depth-SEED.jsonl too; what is there is not measured again. Text and measure are those of texts.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from texts import Texts, Yardstick

from kdscale.config.prune import ImportanceConfig, PruneConfig
from kdscale.models.hidden_states import Scratch
from kdscale.models.loading import open_teacher
from kdscale.prune.apply import apply_plan
from kdscale.prune.importance import collect
from kdscale.prune.search.planning import make_plan
from kdscale.runs.importance_scores import load_scores
from kdscale.runtime.device import resolve_dtype, set_threads
from kdscale.runtime.progress import Reporter

CPU, SILENT = torch.device("cpu"), Reporter(quiet=True)


def main() -> None:
    arguments = parse()
    set_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = arguments.work / f"depth-{arguments.seed}.jsonl"
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    texts = Texts.read(
        arguments.corpus, arguments.teacher, seed=arguments.seed, calibration_tokens=arguments.calibration_tokens
    )
    batches = [batch(ids_BS) for ids_BS in texts.calibration_NS.split(4)]
    yardstick = Yardstick.read(arguments.teacher, texts, arguments.work / f"teacher-{arguments.seed}.safetensors")
    for method in arguments.methods.split(","):
        for count in arguments.layers:
            for repair in arguments.repairs.split(","):
                row = {"layers": count, "method": method, "repair": repair}
                if any(row.items() <= earlier.items() for earlier in done):
                    continue
                row |= one(arguments, method, count, repair, batches, yardstick)
                print(json.dumps(row), flush=True)
                with rows.open("a") as out:
                    out.write(json.dumps(row) + "\n")


def one(
    arguments: argparse.Namespace, method: str, count: int, repair: str, batches: list[Any], yardstick: Yardstick
) -> dict[str, Any]:
    """Prune and measure one student; the scores of a method are measured once, for the smallest count."""
    teacher, family = open_teacher(arguments.teacher)
    folder = arguments.work / f"scores-{arguments.seed}-{method}"
    if not folder.exists():
        cfg, started = PruneConfig(layers=min(arguments.layers), layer_method=method), time.monotonic()
        importance = ImportanceConfig(layer_tokens=arguments.layer_tokens)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        scratch = Scratch(folder.with_name(folder.name + ".scratch"))
        collect.score_teacher(teacher, family, batches, importance, cfg, part, CPU, SILENT, scratch)
        (part / "seconds").write_text(str(round(time.monotonic() - started)))
        part.rename(folder)
    cfg = PruneConfig(layers=count, layer_method=method, layer_repair=repair)
    plan = make_plan(teacher.config, family, dict(load_scores(folder)), cfg)
    out = arguments.work / f"student-{arguments.seed}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = time.monotonic()
    dtype = resolve_dtype("auto", CPU)
    apply_plan(teacher, family, plan, out, cfg, batches=batches, dtype=dtype, reporter=SILENT)
    seconds = round(time.monotonic() - started)
    dropped = sorted(set(range(plan.teacher.layers)) - set(plan.kept.layers))
    scoring = int((folder / "seconds").read_text())
    return {"dropped": dropped, "scoring_seconds": scoring, "prune_seconds": seconds, **yardstick.measure(out)}


def batch(ids_BS: torch.Tensor) -> SimpleNamespace:
    """Whole sequences of one document each."""
    return SimpleNamespace(input_ids_BS=ids_BS, position_ids_BS=torch.arange(ids_BS.shape[1]).expand_as(ids_BS))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for scores, the student and the rows")
    parser.add_argument("--layers", type=int, action="append", required=True, help="how many stay; repeatable")
    parser.add_argument("--methods", default="one_by_one,block_influence,loss,angular")
    parser.add_argument("--repairs", default="none,linear")
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--layer-tokens", type=int, default=4_096)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
