"""One rank works long while the other has nothing to do: who waits, for how long, and who is said to hang."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kdscale_launch import HUNG_EXIT_CODE, JobSpec, RankFailed, run_local

# The wait is twice the watchdog's limit; then rank 1 stops for good.
RANK = """
import os, time
from datetime import timedelta
from pathlib import Path
import torch
from kdscale.files import sha256_file
from kdscale.runtime.ranks import join_launched_group, on_main, rank, unequal_work
from kdscale_launch.watchdog import enter, watching

LIMIT = 3.0
join_launched_group("gloo", torch.device("cpu"), timedelta(seconds=60))

def export():  # hashes what it reads, as a slow disk would
    Path("file").write_bytes(b"weights")
    began = time.monotonic()
    while time.monotonic() - began < 2 * LIMIT:
        sha256_file(Path("file"))
        time.sleep(0.1)
    return ["exported"]

with watching(LIMIT, rank()):
    enter("data")
    result = on_main(export)
    Path(f"result-{rank()}").write_text(repr(result))
    with unequal_work():
        if rank() == 1:
            os.read(os.pipe()[0], 1)
"""


def test_ranks_wait_as_long_as_another_makes_progress_and_no_longer(tmp_path: Path) -> None:
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    spec = JobSpec((sys.executable, "-c", RANK), 2, tmp_path / "logs", env=env, cwd=tmp_path)
    with pytest.raises(RankFailed) as caught:
        run_local(spec)
    assert [(tmp_path / f"result-{rank}").read_text() for rank in range(2)] == ["['exported']"] * 2
    assert (caught.value.rank, caught.value.exit_code) == (1, HUNG_EXIT_CODE)
