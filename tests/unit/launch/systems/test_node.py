"""A node that starts its own ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_node_starts_its_share_of_the_ranks(tmp_path):
    code = "import os; open('r' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in " \
           "('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"  # fmt: skip
    launch = Path(__file__).resolve().parents[4] / "launch"
    command = [sys.executable, "-S", "-m", "kdscale_launch.systems.node", "--nodes", "3", "--slots", "2",
        "--node-rank-from",
               "JOB_COMPLETION_INDEX", "--log-dir", "logs", "--master-addr", "first", "--master-port", "9", "--",
               sys.executable, "-S", "-c", code]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(launch), "JOB_COMPLETION_INDEX": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"r{rank}").read_text() for rank in (4, 5)] == ["0 6 first 9", "1 6 first 9"]
    missing = subprocess.run(
        command, cwd=tmp_path, env={**environment, "JOB_COMPLETION_INDEX": "3"}, capture_output=True, check=False
    )
    assert missing.returncode == 2
