"""The kernel benchmark as it is run: tiny shapes, every contestant accounted for, a page that parses."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SVG = "{http://www.w3.org/2000/svg}"

# One process for everything: most of the cost is importing torch.
SCRIPT = """
import json, sys, torch
if __name__ == "__main__":
    import run
    from measure import Setting, registry
    from memory import peak_bytes
    from shapes import LossShape

    options = "--table tiny --no-compile --measure times errors --rounds 2 --out"
    sys.argv[1:] = [*options.split(), sys.argv[1]]
    run.main()
    cpu = torch.device("cpu")
    (products,) = [c for c in registry(cpu) if (c.op, c.name) == ("linear_sparse_kl", "bare products")]
    settings = [Setting(LossShape(n, 16, 16384, 8), torch.bfloat16, cpu, "forward") for n in (256, 2048)]
    peaks = [peak_bytes(products, setting) for setting in settings]
    expected = [[c.op, c.name, c.mode, direction] for c in registry(cpu) for direction in c.directions]
    print(json.dumps({"expected": expected, "peaks": peaks}))
"""


class Ran(NamedTuple):
    rows: list[dict[str, str]]
    page: ElementTree.Element
    expected: set[tuple[str, ...]]
    peaks: list[tuple[int, str]]

    def find(self, **cells: str) -> dict[str, str]:
        (row,) = [row for row in self.rows if all(row[name] == value for name, value in cells.items())]
        return row


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    out = tmp_path_factory.mktemp("bench")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks" / "kernels")))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(out)]
    done = subprocess.run(command, env=env, cwd=out, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (table,) = out.glob("*.csv")
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    page = ElementTree.fromstring(table.with_suffix(".html").read_text(encoding="utf-8"))
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Ran(rows, page, {tuple(entry) for entry in said["expected"]}, said["peaks"])


def test_every_contestant_has_a_row_for_each_direction_or_a_reason(ran: Ran) -> None:
    assert {(row["op"], row["contestant"], row["mode"], row["direction"]) for row in ran.rows} == ran.expected
    assert len(ran.rows) == len(ran.expected)
    for row in ran.rows:
        assert row["status"] in ("ok", "cannot run here", "failed"), row
        assert (row["status"] == "ok") != bool(row["reason"]), row
        assert (row["status"] == "ok") == bool(row["seconds_median"]), row


def test_what_needs_no_peer_runs_and_the_others_say_why_not(ran: Ran) -> None:
    own = [row for row in ran.rows if row["contestant"] in ("kdscale", "eager torch", "bare products", "bare copy")]
    assert [row["reason"] for row in own if row["status"] == "failed"] == []
    assert all(row["ratio_to_ours"] == "1.0" for row in own if (row["contestant"], row["mode"]) == ("kdscale", "auto"))
    for name, module in (("cut-cross-entropy", "cut_cross_entropy"), ("Liger fused linear JSD", "liger_kernel")):
        reasons = {row["reason"] for row in ran.rows if row["contestant"] == name and row["mode"] != "torch_compile"}
        missing = importlib.util.find_spec(module) is None
        assert len(reasons) == 1 and ("not installed" if missing else "needs a GPU") in reasons.pop()


def test_columns_hold_quantiles_errors_and_versions(ran: Ran) -> None:
    where = {"op": "linear_sparse_kl", "direction": "forward+backward"}
    row = ran.find(contestant="kdscale", mode="auto", **where)
    assert [row[name] for name in ("N", "H", "V", "K", "dtype", "threads")] == ["24", "16", "256", "8", "bfloat16", "1"]
    assert 0 < float(row["seconds_p20"]) <= float(row["seconds_median"]) <= float(row["seconds_p80"])
    assert float(row["cpu_seconds_median"]) > 0 and row["cpu_ratio_to_ours"] == "1.0"
    for regime in ("random", "noise_03", "noise_005"):
        assert 0 < float(row[f"error_dX_{regime}"]) < 5e-3 and 0 < float(row[f"error_dW_{regime}"]) < 5e-3
    assert row["torch"] and row["device"] and row["date"] and row["rounds"] == "2"
    eager = ran.find(contestant="eager torch", **where)
    assert float(eager["error_dX_noise_005"]) > 0.02, "bf16 logits: the error that the kernels avoid"


def test_page_is_well_formed_loads_nothing_and_draws_every_time(ran: Ran) -> None:
    drawn = [text.text or "" for figure in ran.page.iter(f"{SVG}svg") for text in figure.iter(f"{SVG}text")]
    for op in {row["op"] for row in ran.rows}:
        measured = [row for row in ran.rows if row["op"] == op and row["seconds_median"]]
        direction = max(row["direction"] for row in measured)
        for row in measured:
            assert row["direction"] != direction or any(text.startswith(row["contestant"]) for text in drawn), row
    assert not [element for element in ran.page.iter() if "src" in element.attrib or "href" in element.attrib]


def test_peak_memory_of_the_bare_product_is_its_logits(ran: Ran) -> None:
    (small, reason), (large, other_reason) = ran.peaks
    assert reason == other_reason == ""
    assert large - small == pytest.approx((2048 - 256) * 16384 * 2, rel=0.1)


@pytest.mark.gpu
@pytest.mark.timeout(660)  # it compiles every kernel
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_that_is_installed_fails_on_a_gpu(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels" / "run.py"), "--device", "cuda", "--rounds", "2"]
    command += ["--no-compile", "--shape", "128", "64", "1024", "8", "--out", str(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, check=True, timeout=600)
    (table,) = tmp_path.glob("*.csv")
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row for row in rows if row["status"] == "failed"] == []
    assert all(row["peak_bytes"] for row in rows if row["status"] == "ok")
