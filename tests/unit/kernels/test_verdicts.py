"""The kernel benchmark's targets, judged on made-up rows: what a run on the reference GPU would print."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "kernels"
REFERENCE, HALF = (16384, 4096, 128256, 64), (8192, 4096, 128256, 64)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """benchmarks/kernels, whose modules have names of their own folder only."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("verdicts")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def row(
    op: str, contestant: str, mode: str, shape: tuple[int, ...] = REFERENCE, threads: Any = "", **cells: Any
) -> Any:
    direction = "forward" if op == "linear_topk_lse" else "forward+backward"
    made = sys.modules["rows"].Row(op, contestant, mode, "", direction, "ok", "", *shape, "bfloat16", threads=threads)
    for name, value in cells.items():
        setattr(made, name, value)
    return made


def gpu_rows(slower: float = 1.0) -> list[Any]:
    """Everything met at slower=1, everything with a time or a size missed at 2."""
    student, both = "linear_sparse_kl", "teacher_and_student"
    return [
        row(student, "kdscale", "auto", ratio_to_ours=1.0, error_dX_noise_005=0.002 * slower**2),
        row(student, "kdscale", "row chunks of 4 GiB", ratio_to_ours=0.9 * slower),
        row(student, "kdscale", "vocabulary slices", ratio_to_ours=1.3 * slower, peak_bytes=int(0.44e9 * slower)),
        row(student, "kdscale", "row chunks", ratio_to_ours=1.0, peak_bytes=int(1.1e9 * slower)),
        row(student, "bare products", "", ratio_to_ours=0.85),
        row("linear_topk_lse", "kdscale", "auto", ratio_to_ours=1.0 * slower),
        row("linear_topk_lse", "bare products", "", ratio_to_ours=0.95),
        row("sparse_kl", "kdscale", "in place", seconds_median=3.2e-3 * slower),
        row(both, "Liger fused linear JSD", "JSD", HALF, ratio_to_ours=4.0 / slower),
        row(both, "kdscale", "auto", HALF, ratio_to_ours=1.0),
    ]


def test_every_gpu_target_is_judged_and_the_best_mode_named(bench: Any) -> None:
    found = {verdict.target: verdict for verdict in bench.verdicts(gpu_rows())}
    assert len(found) == 7 and all(verdict.met for verdict in found.values()), found
    products = found["time: linear_sparse_kl / three bare products (row chunks of 4 GiB)"]
    assert (products.limit, products.measured) == ("≤ 1.1", "1.06")
    assert found["sparse_kl in place"].limit == "≤ 3.3 ms"
    assert found["time, N=8192: Liger fused linear JSD / teacher and student"].limit == "≥ 3.5"


def test_misses_are_said(bench: Any) -> None:
    found = bench.verdicts(gpu_rows(slower=2.0))
    assert [verdict.met for verdict in found] == [False] * 7, found


def test_what_is_missing_is_not_measured_and_a_cpu_has_targets_of_its_own(bench: Any) -> None:
    failed = [made for made in gpu_rows() if made.contestant == "kdscale"]
    found = {verdict.target: verdict.met for verdict in bench.verdicts(failed)}
    assert found["time: linear_topk_lse / one bare product (auto)"] is None
    assert found["time, N=8192: Liger fused linear JSD / teacher and student"] is None
    cpu = row("linear_sparse_kl", "eager torch", "", (2048, 576, 49152, 64), 2, ratio_to_ours=1.2, peak_bytes=800)
    own = row("linear_sparse_kl", "kdscale", "auto", (2048, 576, 49152, 64), 2, ratio_to_ours=1.0, peak_bytes=80)
    found = {verdict.target: verdict.met for verdict in bench.verdicts([cpu, own])}
    assert found["peak memory: linear_sparse_kl (auto) / eager torch"] is True
    assert found["time: linear_sparse_kl (auto) / eager torch"] is True
