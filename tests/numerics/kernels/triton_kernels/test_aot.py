"""Every Triton body, tile and target compiled ahead of time: no spills, and shared memory that exists on the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (the dev extra installs it on Linux)")

ROOT = Path(__file__).resolve().parents[4]
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


def compile_all(which, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("triton_aot.py")
    done = subprocess.run([sys.executable, str(script), which], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # "all" is 416 compilations
@pytest.mark.parametrize("which", ["few", "all"])
def test_no_target_spills_or_asks_for_too_much_shared_memory(which, tmp_path):
    if which == "all" and not os.environ.get("KDSCALE_AOT_ALL"):
        pytest.skip("every divergence and tail takes minutes: set KDSCALE_AOT_ALL=1")
    records = compile_all(which, tmp_path)
    assert {record["target"] for record in records} == set(SHARED_LIMIT if which == "all" else ("sm_90", "gfx942"))
    bad = [r for r in records if r["spills"] or r["stack"] or r["local"] or r["shared"] > SHARED_LIMIT[r["target"]]]
    assert not bad
    losses = [r for r in records if r["name"].startswith(("sparse_kl", "full_kl")) and "barriers" in r]
    assert all(record["vector_loads"] for record in losses)  # 16 bytes a load, not 4
    # Masking, the end of the sweep and, for a gradient narrower than its logits, each block: order kept by barriers.
    by_name = {(record["name"], record["target"]): record["barriers"] for record in losses}
    for (name, target), barriers in by_name.items():
        if name.endswith("plain"):
            other = "fp32 in place, CE" if name.startswith("full_kl") else "bf16 in place, CE"
            assert barriers > by_name[name.replace("plain", other), target]
