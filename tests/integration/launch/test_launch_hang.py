"""A rank that stops in the middle of real collectives: who notices, who is named, and that nothing stays."""

from __future__ import annotations

import sys
from pathlib import Path

from kdscale_launch import HUNG_EXIT_CODE, Cluster, Host, Reach, Task

ROOT = Path(__file__).resolve().parents[3]
STOPS = """
import os, signal, torch, torch.distributed as dist
from kdscale_launch.watchdog import at_step, enter, watching
dist.init_process_group("gloo")
rank = dist.get_rank()
with watching(2.0, rank):
    for step in range(1, 10):
        at_step(step, lambda: "documents 7")
        enter("collective")
        if rank == 1 and step == 4:
            open("stopped", "w").write(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
os._exit(0)
"""


def test_a_rank_that_stops_is_named_and_killed_and_the_others_do_not_wait_for_ever(tmp_path, fake_ssh):
    reach = Reach(sys.executable, str(tmp_path), str(ROOT / "launch"), (str(fake_ssh),), connect_seconds=60.0)
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with Cluster([Host("one", 1), Host("two", 1)], reach) as cluster:
        assert cluster.connect() == {}
        port = cluster.free_port()
        assert port is not None
        outcome = cluster.run(
            Task(
                (sys.executable, "-c", STOPS), env, log_dir=str(tmp_path / "logs"), master_addr="127.0.0.1",
                master_port=port, grace=0.5,
            )
        )  # fmt: skip
    text = outcome.describe()
    assert text.startswith("host two, rank 1: stopped by a signal"), text
    hung = next(line for line in text.splitlines() if "host one, rank 0" in line)
    assert "hung in all_reduce (torch/distributed/distributed_c10d.py" in hung
    assert "phase collective, step 4, documents 7" in hung
    assert "waiting for other ranks" in hung
    assert outcome.codes[0] == HUNG_EXIT_CODE
    assert "most recent call first" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert not Path("/proc", (tmp_path / "stopped").read_text()).exists()
