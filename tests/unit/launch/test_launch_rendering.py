"""Hostfiles, forwarded variables, and what is rendered for Slurm, Kubernetes, torchrun and DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale_launch import Host, LaunchError, parse_hostfile
from kdscale_launch.environment import forwarded_variables, masked_lines, without_secrets
from kdscale_launch.hosts.failure import Failure, Outcome, last_error
from kdscale_launch.hosts.hostfile import first_ranks
from kdscale_launch.rendezvous import parse_rank_place, set_gloo_interface, take_rank_place
from kdscale_launch.systems import kubernetes as kube
from kdscale_launch.systems import slurm, torchrun_deepspeed


def test_a_hostfile_in_deepspeeds_format():
    text = "# two\n\nworker-1 slots=4  # big\nroot@10.0.0.2   slots=2\n"
    hosts = parse_hostfile(text)
    assert hosts == (Host("worker-1", 4), Host("root@10.0.0.2", 2))
    assert first_ranks(hosts) == [0, 4]
    assert hosts[1].address == "10.0.0.2"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "lists no host"),
        ("worker-1\n", r"line 1: expected `host slots=N`, got 'worker-1'"),
        ("a slots=1\n\na slots=2", "line 3: a is listed twice"),
        ("a slots=0", "line 1: a has no slots"),
        ("-oProxyCommand=x slots=1", "is not a host name"),
        ("a;reboot slots=1", "is not a host name"),
        ("$(x) slots=1", "is not a host name"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(text, problem):
    with pytest.raises(LaunchError, match=problem.replace("(", r"\(").replace(")", r"\)").replace("$", r"\$")):
        parse_hostfile(text)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_no_hostfile_smuggles_an_option_or_a_shell_word_in(text):
    try:
        hosts = parse_hostfile(text)
    except LaunchError:
        return
    for host in hosts:
        assert not host.name.startswith("-")
        assert not set(host.name) & set(" \t\n;|&$`'\"\\<>(){}*?!#~")


def test_only_listed_variables_are_sent_and_secrets_are_masked():
    environment = {"PATH": "/x", "HF_TOKEN": "t", "HF_HOME": "/h", "OMP_NUM_THREADS": "2", "MY_FLAG": "1"}
    assert forwarded_variables(environment) == {"HF_HOME": "/h", "HF_TOKEN": "t", "OMP_NUM_THREADS": "2"}
    assert "MY_FLAG" in forwarded_variables(environment, ["MY_*"])
    assert without_secrets(forwarded_variables(environment)) == {"HF_HOME": "/h", "OMP_NUM_THREADS": "2"}
    assert "HF_TOKEN=***" in masked_lines(forwarded_variables(environment))


def test_a_place_is_taken_out_of_the_environment_and_read_back():
    environment = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
                   "MASTER_PORT": "77", "HOME": "/h"}  # fmt: skip
    place = parse_rank_place(take_rank_place(environment))
    assert environment == {"HOME": "/h"}
    assert (place.first_rank, place.world_size, place.local_world_size) == (0, 4, 2)
    assert (place.master_addr, place.master_port) == ("a", 77)
    with pytest.raises(LaunchError, match="WORLD_SIZE"):
        take_rank_place({"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its interfaces")
def test_gloo_is_given_the_interface_that_leads_to_rank_0():
    environment = {"MASTER_ADDR": "127.0.0.1"}
    set_gloo_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    given = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}
    set_gloo_interface(given)
    assert given["GLOO_SOCKET_IFNAME"] == "ib0"
    nowhere = {"MASTER_ADDR": "no-such-host.invalid"}
    set_gloo_interface(nowhere)
    assert "GLOO_SOCKET_IFNAME" not in nowhere


def test_the_earliest_cause_is_first():
    def failed(rank: int, when: float, said: str, code: int = 1) -> Failure:
        return Failure(0, rank, "", said, when, code)

    closed = "Traceback (most recent call last):\n  x\nRuntimeError: Connection closed by peer"
    outcome = Outcome([Host("a", 4)], failures=[failed(0, 1.0, closed), failed(1, 2.0, "", -9), failed(2, 1.5, "oops")])
    assert outcome.first().rank == 2
    assert failed(1, 0.0, closed, code=-9).is_effect is False  # whoever was killed is a cause, whatever it said before
    assert last_error("noise\nTraceback (most recent call last):\n  f\nA: 1\n").startswith("Traceback")
    assert len(last_error("x\n" * 500).splitlines()) == 40


# --- Slurm: the script is executed, with stand-ins for Slurm's commands

SCONTROL = '#!/bin/sh\n[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" >> requeued\n'
SRUN = """#!/bin/bash
shift
pids=()
trap 'kill -TERM "${pids[@]}"' TERM
for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=0 "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"; this=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; this=$?; done
    [ "$this" -gt "$code" ] && code=$this
done
exit $code
"""


@pytest.fixture
def slurm_script(tmp_path: Path):
    """Runs a rendered script for two ranks of `code`; gives the process."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def start(code: str, restarts_so_far: int = 0, **settings) -> subprocess.Popen[str]:
        job = slurm.SlurmJob(
            "kdscale-x", 2, 1, (sys.executable, "-S", "-c", code, "a b", "$HOME"), str(tmp_path), "log", **settings
        )
        script = tmp_path / "job.sbatch"
        script.write_text(slurm.render(job))
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "12345",
                       "SLURM_RESTART_COUNT": str(restarts_so_far)}  # fmt: skip
        return subprocess.Popen(["bash", str(script)], env=environment, text=True, stdout=subprocess.PIPE)

    return start


def test_slurm_ranks_get_torchs_environment_and_untouched_arguments(slurm_script, tmp_path):
    code = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HF_HOME")
json.dump([os.environ[n] for n in names] + sys.argv[1:], open("rank-" + os.environ["RANK"], "w"))
"""
    process = slurm_script(code, env={"HF_HOME": "/a b"})
    process.communicate(timeout=30)
    assert process.returncode == 0
    seen = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert seen == [[str(rank), "0", "2", "1", "n1", "22345", "/a b", "a b", "$HOME"] for rank in range(2)]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("exit_code", "so_far", "requeued"), [(75, 9, True), (1, 0, True), (1, 2, False), (4, 0, False), (137, 1, True)]
)
def test_slurm_requeues_what_another_try_can_mend(slurm_script, tmp_path, exit_code, so_far, requeued):
    process = slurm_script(f"import sys; sys.exit({exit_code})", so_far, max_restarts=2, final_codes=frozenset({2, 4}))
    process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 12345\n"


def test_slurms_warning_reaches_the_ranks_and_requeues(slurm_script, tmp_path):
    code = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open("ready-" + os.environ["RANK"], "w").close()
while True: time.sleep(0.05)
"""
    process = slurm_script(code)
    deadline = time.monotonic() + 20
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "requeued" in said
    assert (tmp_path / "requeued").exists()


def test_a_failed_check_keeps_the_job_from_starting(slurm_script, tmp_path):
    check = (sys.executable, "-S", "-c", "import sys; sys.exit(3)")
    process = slurm_script("open('started', 'w')", check=check)
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert not (tmp_path / "started").exists()


def test_the_slurm_header():
    job = slurm.SlurmJob("kdscale-x", 4, 8, ("python",), "/w", "/o", time_limit="1-00:00:00", warn_seconds=120,
                         directives=("partition=gpu", "exclusive"))  # fmt: skip
    lines = slurm.render(job).splitlines()
    for option in ("nodes=4", "ntasks-per-node=8", "requeue", "signal=B:TERM@120", "time=1-00:00:00", "exclusive"):
        assert f"#SBATCH --{option}" in lines
    with pytest.raises(LaunchError, match="not an sbatch option"):
        slurm.render(slurm.SlurmJob("x", 1, 1, ("p",), "/", "/o", directives=("a\nreboot",)))


# --- Kubernetes


@pytest.fixture
def pods() -> kube.KubernetesJob:
    return kube.KubernetesJob(
        "kdscale-x", 4, 8, "registry/image:1", ("python", "-m", "kdscale.jobs.rank", "/data/c.yaml"), "/data/logs",
        "/data", volumes={"claim": "/data"}, secrets=("hf",), gpus=8, env={"HF_HOME": "/data/hf"},
        final_codes=frozenset({2, 3}),
    )  # fmt: skip


def test_an_indexed_job_finds_its_first_pod_by_name(pods):
    service, job = kube.indexed_job(pods)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]  # ranks meet before any pod is ready
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    command = pod["containers"][0]["command"]
    assert command[command.index("--master-addr") + 1] == "kdscale-x-0.kdscale-x"
    assert command[command.index("--") + 1 :] == list(pods.command)
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    ignored = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    assert {"operator": "In", "values": [75]} in [rule.get("onExitCodes") for rule in ignored]


def test_kubernetes_objects_hold_to_the_published_schema(pods):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate carries the schema")
    version = validate.latest_version()
    for item in kube.indexed_job(pods):
        validate.validate(item, version, strict=True)
    broken = kube.indexed_job(pods)[1]
    broken["spec"]["completion"] = 3
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, version, strict=True)


def test_a_pytorchjob_has_one_master_and_leaves_the_address_to_the_operator(pods):
    (job,) = kube.pytorch_job(pods)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 3)
    container = replicas["Worker"]["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"
    assert "--master-addr" not in container["command"]


@pytest.mark.parametrize("name", ["Big", "a_b", "-a", "a" * 60, ""])
def test_a_name_that_kubernetes_would_refuse_is_refused_here(name):
    with pytest.raises(LaunchError, match="not a Kubernetes name"):
        kube.KubernetesJob(name, 1, 1, "i", ("p",), "/l", "/")


def test_a_node_starts_its_share_of_the_ranks(tmp_path):
    code = "import os; open('r' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in " \
           "('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"  # fmt: skip
    launch = Path(__file__).resolve().parents[3] / "launch"
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


def test_torchrun_meets_over_c10d():
    command = torchrun_deepspeed.torchrun("py", "kdscale.jobs.rank", ("c.yaml", "a=b c"), nodes=2, slots=4,
        endpoint="n1:29400",
                              job_id="x", max_restarts=5)  # fmt: skip
    assert command[-4:] == ["--module", "kdscale.jobs.rank", "c.yaml", "a=b c"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400"} <= set(command)
    assert torchrun_deepspeed.TORCHRUN_ENVIRONMENT == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_deepspeeds_runner_gets_nothing_that_its_shell_would_change():
    reach = {"hostfile": "/h", "master_addr": "a", "master_port": 1}
    assert "--no_local_rank" in torchrun_deepspeed.deepspeed("py", "m", ("c.yaml",), **reach)
    with pytest.raises(LaunchError, match="use --launcher ssh"):
        torchrun_deepspeed.deepspeed("py", "m", ("c.yaml", "name=$(reboot)"), **reach)
    environment = torchrun_deepspeed.deepspeed_environment("-F config", "/e", 15.0)
    assert environment["PDSH_SSH_ARGS_APPEND"] == "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -F config"
