"""Weights that stay gathered over the micro-batches of a step at ZeRO stage 3: fewer gathers, and no other bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MICRO_BATCHES, STEPS = 4, 3
WIDTHS = [8, 40, 6, 20, 8]  # layers of 320, 240, 120 and 160 weights
KEPT = {"none": 0, "some": 330, "all": 10_000}  # parameters: none, the first layer, all


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("kept")
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    ended = subprocess.run(
        [sys.executable, __file__, folder], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-6000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in KEPT}


def test_no_loss_changes(found: dict[str, dict[str, list[float]]]) -> None:
    assert len(set(found["none"]["losses"])) == STEPS * MICRO_BATCHES
    assert found["some"]["losses"] == found["all"]["losses"] == found["none"]["losses"]


def test_what_stays_is_gathered_once_a_step(found: dict[str, dict[str, list[float]]]) -> None:
    gathers = {name: rows["gathers"][-1] for name, rows in found.items()}
    layers = len(WIDTHS) - 1
    assert gathers["none"] % MICRO_BATCHES == 0
    assert gathers["all"] == layers
    assert gathers["all"] < gathers["some"] < gathers["none"]


def work(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn

    from kdscale.config.load import build_config
    from kdscale.distill.engine import make_engine
    from kdscale.distill.parallel.deepspeed_config import deepspeed_config
    from kdscale.distill.parallel.process_group import join_group

    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    join_group(torch.device("cpu"))
    from deepspeed.comm import comm

    counted: Counter[str] = Counter()
    gather = comm.cdb.all_gather_into_tensor

    def count(*args: object, **kwargs: object) -> object:
        counted["gathers"] += 1
        return gather(*args, **kwargs)

    comm.cdb.all_gather_into_tensor = count
    for name, kept in KEPT.items():
        # nothing is fetched ahead, so that every gather is one layer's
        zero = {"keep_gathered": kept, "extra": {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}}
        settings = {"zero_stage": 3, "processes": 2, "micro_batch": 1, "global_batch": 2 * MICRO_BATCHES, "zero": zero,
                    "optimizer": {"lr": 0.05}}  # fmt: skip
        tree = {"name": "t", "run_dir": "r", "teacher": {"path": "p"}, "prune": {"ffn": 8}, "distill": settings}
        cfg = build_config(tree, "test")
        torch.manual_seed(0)
        layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(WIDTHS)]
        model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).to(torch.bfloat16)
        engine = make_engine(cfg, model, 3, deepspeed_config(cfg.distill, 3, bf16=True, device="cpu"), None)
        inputs, losses, gathers = torch.Generator().manual_seed(rank), [], []
        for _ in range(STEPS):
            counted.clear()
            for _ in range(MICRO_BATCHES):
                loss = engine(torch.randn(4, WIDTHS[0], generator=inputs).to(torch.bfloat16)).float().square().sum()
                losses.append(float(loss.detach()))
                engine.backward(loss, scale_wrt_gas=False)
                engine.step()
            gathers.append(counted["gathers"])
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps({"losses": losses, "gathers": gathers}))
    dist.barrier()


if __name__ == "__main__":
    from tests.integration.forks import fork_ranks

    place = Path(sys.argv[1])
    sys.exit(any(fork_ranks(2, lambda rank: work(place, rank))))
