"""Whether masked runs with ridge rank candidates in the same order as the students that two_stream makes of them.

One JSON row per shape: the KL divergence from the teacher, on text that no regression saw; the rank correlations last.

    python benchmarks/prune/candidate_ranking.py TEACHER CORPUS --work /tmp/ranking

CORPUS as in prune_methods.py. The shapes keep half of SmolLM2-135M's non-embedding parameters, within 4 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from prune_methods import CPU, measure_scores, positions, texts
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.data.packing import IGNORED_LABEL
from kdscale.models.loading import load_model, open_teacher
from kdscale.prune.apply import apply_plan
from kdscale.prune.search.masked import score_masked
from kdscale.prune.search.planning import make_plan
from kdscale.runtime.device import resolve_dtype, set_threads
from kdscale.runtime.progress import Reporter

SHAPES: list[dict[str, int]] = [
    {"ffn": 640, "heads": 6, "kv_heads": 3, "layers": 30},
    {"ffn": 704, "heads": 6, "kv_heads": 2, "layers": 30},
    {"ffn": 736, "heads": 6, "kv_heads": 2, "layers": 29},
    {"ffn": 768, "heads": 9, "kv_heads": 3, "layers": 24},
    {"ffn": 832, "heads": 4, "kv_heads": 2, "layers": 29},
    {"ffn": 864, "heads": 3, "kv_heads": 1, "layers": 30},
]


def main() -> None:
    arguments = parse()
    set_threads(arguments.threads)
    folder, work = Path(arguments.teacher), Path(arguments.work)
    calibration, heldout = texts(arguments, folder)
    batches = [SimpleNamespace(input_ids_BS=ids, position_ids_BS=positions(ids)) for ids in calibration.split(4)]
    scored = [labelled(ids) for ids in heldout["all"].split(4)]
    teacher, family = open_teacher(folder)
    everything = PruneConfig(ffn=640, heads=6, kv_heads=2, layers=24)
    scores = measure_scores(folder, batches, everything, work / "scores")
    dtype = resolve_dtype("auto", CPU)
    plans = {
        method: [make_plan(teacher.config, family, scores, PruneConfig(**shape, compensate=method)) for shape in SHAPES]
        for method in ("none", "ridge", "two_stream")
    }
    kl: dict[str, list[float]] = {}
    for method in ("none", "ridge"):
        started = time.monotonic()
        masked = score_masked(teacher, family, plans[method], scored, calibration=batches, ridge=1e-2, dtype=dtype)
        kl[f"masked, {method}"] = [score.kl for score in masked]
        print(json.dumps({"masked": method, "seconds": round(time.monotonic() - started)}), flush=True)
    kl["student, two_stream"] = []
    for shape, plan in zip(SHAPES, plans["two_stream"], strict=True):
        out, started = work / "student", time.monotonic()
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        cfg = PruneConfig(**shape)
        apply_plan(teacher, family, plan, out, cfg, batches=batches, dtype=dtype, reporter=Reporter(quiet=True))
        kl["student, two_stream"].append(divergence(folder, out, scored))
        row = {name: round(values[len(kl["student, two_stream"]) - 1], 4) for name, values in kl.items()}
        print(json.dumps({**shape, **row, "seconds": round(time.monotonic() - started)}), flush=True)
    of_student = kl.pop("student, two_stream")
    rows = {name: round(rank_correlation(values, of_student), 3) for name, values in kl.items()}
    print(json.dumps({"rank correlation with the two_stream students": rows}))


def labelled(ids_BS: Tensor) -> Any:
    """A batch that is scored on every next token."""
    labels_BS = torch.cat([ids_BS[:, 1:], ids_BS.new_full((len(ids_BS), 1), IGNORED_LABEL)], dim=1)
    return SimpleNamespace(input_ids_BS=ids_BS, position_ids_BS=positions(ids_BS), labels_BS=labels_BS)


@torch.inference_mode()
def divergence(teacher: Path, student: Path, batches: list[Any]) -> float:
    """KL(teacher ‖ student) in nats per token."""
    models = [load_model(path, dtype=resolve_dtype("auto", CPU), device=CPU) for path in (teacher, student)]
    total, count = 0.0, 0
    for batch in batches:
        for ids_S in batch.input_ids_BS:
            log_p_SV, log_q_SV = (
                torch.log_softmax(model(input_ids=ids_S[None], use_cache=False).logits[0, :-1].float(), dim=-1)
                for model in models
            )
            total += float((log_p_SV.exp() * (log_p_SV - log_q_SV)).double().sum())
            count += len(log_p_SV)
    return total / count


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation, for values without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="candidates ranked with ridge against students made by two_stream")
    parser.add_argument("teacher")
    parser.add_argument("corpus")
    parser.add_argument("--work", required=True, help="folder for the scores and the student that is measured")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--heldout-rows", type=int, default=1, help="sequences of each source")
    parser.add_argument("--also", default="", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
