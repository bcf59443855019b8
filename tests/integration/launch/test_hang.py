"""A rank that stops in the middle of real collectives: who notices, who is named, and that nothing stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kdscale_launch import HUNG_EXIT_CODE, Host, HostConnections, HostsJob, SshSettings, Task, run_hosts

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
    ssh = SshSettings(sys.executable, str(tmp_path), str(ROOT / "launch"), (str(fake_ssh),), connect_seconds=60.0)
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with HostConnections([Host("one", 1), Host("two", 1)], ssh) as connections:
        assert connections.connect() == {}
        port = connections.free_port()
        assert port is not None
        outcome = connections.run(
            Task(
                (sys.executable, "-c", STOPS), env, log_dir=str(tmp_path / "logs"), master_addr="127.0.0.1",
                master_port=port, grace_seconds=0.5,
            )
        )  # fmt: skip
    text = outcome.describe()
    assert text.startswith("host two, rank 1: stopped by a signal"), text
    hung = next(line for line in text.splitlines() if "host one, rank 0" in line)
    assert "hung in all_reduce (torch/distributed/distributed_c10d.py" in hung
    assert "phase collective, step 4, documents 7" in hung
    assert "waiting for other ranks" in hung
    assert outcome.exit_codes[0] == HUNG_EXIT_CODE
    assert "most recent call first" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert not Path("/proc", (tmp_path / "stopped").read_text()).exists()


# Stands in for the package `datasets`: the first try's stream stalls for ever, the second one's does not.
STALLS = """
import os
def load_dataset(name, config, split, streaming):
    for number in range(40):
        if number == 7 and not os.path.exists("stalled"):
            open("stalled", "w").close()
            os.read(os.pipe()[0], 1)
        yield {"text": f"Record {number} of a stream that says {number * number} and little else."}
"""


@pytest.mark.long
def test_a_download_that_stalls_is_named_and_the_job_starts_again(
    tmp_path: Path, tiny_config: Path, fake_ssh: Path, kdscale_environment: dict[str, str]
) -> None:
    (tmp_path / "datasets.py").write_text(STALLS)
    path = os.pathsep.join([str(tmp_path), kdscale_environment["PYTHONPATH"]])
    settings = ("data.sources=[{path: 'hf:stalls'}]", "runtime.watchdog_seconds=8", "importance.calibration_tokens=64")
    job = HostsJob(
        (Host("one", 1),),
        (sys.executable, "-m", "kdscale.jobs.rank", str(tiny_config), "--until=data", *settings),
        SshSettings(sys.executable, str(tmp_path), str(ROOT / "launch"), (str(fake_ssh),), connect_seconds=60.0),
        log_dir=str(tmp_path / "logs"), env={"OMP_NUM_THREADS": "1", "PYTHONPATH": path}, master_addr="127.0.0.1",
        grace_seconds=0.5, max_restarts=1,
    )  # fmt: skip
    said: list[str] = []
    assert run_hosts(job, [], said.append, lambda text: None) == 0
    text = "\n".join(said)
    assert "host one, rank 0: hung in load_dataset (" in text
    assert "phase Tokenizing, no progress for" in text
    assert "restart 1 of 1" in text
    (first, _) = sorted((tmp_path / "logs").glob("*/rank-0.log"))
    assert "read_documents" in first.read_text()  # the whole stack
    assert (tmp_path / "run" / "data" / "manifest.json").exists()
