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
    environment = torchrun_deepspeed.torchrun_environment(90)
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"


def test_deepspeeds_runner_gets_nothing_that_its_shell_would_change():
    ssh = {"hostfile": "/h", "master_addr": "a", "master_port": 1}
    assert "--no_local_rank" in torchrun_deepspeed.deepspeed("py", "m", ("c.yaml",), **ssh)
    with pytest.raises(LaunchError, match="use --launcher ssh"):
        torchrun_deepspeed.deepspeed("py", "m", ("c.yaml", "name=$(reboot)"), **ssh)
    for changed in ({"master_addr": "a;reboot"}, {"master_addr": "-v@a"}, {"hostfile": "/a b"}, {"cwd": "/a b"}):
        with pytest.raises(LaunchError, match=r"--master-addr|cannot pass the argument '/a b'"):
            torchrun_deepspeed.deepspeed("py", "m", ("c.yaml",), **{**ssh, **changed})
    environment = torchrun_deepspeed.deepspeed_environment("-F config", "/e", 15.0)
    assert environment["PDSH_SSH_ARGS_APPEND"] == "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -F config"


@pytest.mark.parametrize("variables", [{"HF_$(reboot)": "1"}, {"HF_HOME": "a\nexport PATH=/tmp"}])
def test_the_file_of_variables_holds_variables_alone(variables):
    assert torchrun_deepspeed.env_file({"HF_HOME": "/a b;c"}) == "HF_HOME='/a b;c'\n"
    with pytest.raises(LaunchError, match="environment variable"):
        torchrun_deepspeed.env_file(variables)


def test_torchruns_endpoint_is_a_host():
    with pytest.raises(LaunchError, match="--master-addr"):
        torchrun_deepspeed.torchrun("py", "m", (), nodes=1, slots=1, endpoint="a b\n:1", job_id="x", max_restarts=0)
