"""Command lines of torchrun and DeepSpeed's runner."""

from __future__ import annotations

import pytest

from kdscale_launch import LaunchError
from kdscale_launch.systems import torchrun_deepspeed


def test_torchrun_meets_over_c10d():
    command = torchrun_deepspeed.torchrun("py", "kdscale.jobs.rank", ("c.yaml", "a=b c"), nodes=2, slots=4,
        endpoint="n1:29400",
                              job_id="x", max_restarts=5)  # fmt: skip
    assert command[-4:] == ["--module", "kdscale.jobs.rank", "c.yaml", "a=b c"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400"} <= set(command)
    assert torchrun_deepspeed.TORCHRUN_ENVIRONMENT == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_deepspeeds_runner_gets_nothing_that_its_shell_would_change():
    ssh = {"hostfile": "/h", "master_addr": "a", "master_port": 1}
    assert "--no_local_rank" in torchrun_deepspeed.deepspeed("py", "m", ("c.yaml",), **ssh)
    with pytest.raises(LaunchError, match="use --launcher ssh"):
        torchrun_deepspeed.deepspeed("py", "m", ("c.yaml", "name=$(reboot)"), **ssh)
    environment = torchrun_deepspeed.deepspeed_environment("-F config", "/e", 15.0)
    assert environment["PDSH_SSH_ARGS_APPEND"] == "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -F config"
