"""The example in docs/how-to/use-the-kernels.md runs, by hand and under transformers' Trainer, and learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
RANK_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
EXAMPLE = ROOT / "benchmarks" / "kernels" / "trl_style_loop.py"


@pytest.mark.parametrize("how", [[], ["--trainer"]])
def test_it_learns(how: list[str]) -> None:
    # in a process of its own: a Trainer leaves RANK and more behind in the environment
    code = "import json, trl_style_loop, sys; print(json.dumps(trl_style_loop.main(sys.argv[1:])))"
    sources = os.pathsep.join(str(path) for path in (EXAMPLE.parent, ROOT / "kernels"))
    # tests that train in this process leave a rank behind, which a Trainer would take for a launcher's
    clean = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code, *how, "--steps", "25"], capture_output=True, text=True, check=False, timeout=200,
        env={**clean, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    assert len(losses) == 25
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_it_needs_nothing_of_kdscale():
    imported = [
        line.split()[1].split(".")[0] for line in EXAMPLE.read_text().splitlines() if line[:5] in ("from ", "impor")
    ]
    assert "kdscale_kernels" in imported
    assert "kdscale" not in imported
