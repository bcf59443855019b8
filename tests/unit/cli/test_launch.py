"""`kdscale launch` and `kdscale preflight` on the command line: what is refused, and what --dry-run prints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from kdscale.cli.main import make_app
from kdscale.errors import ConfigError, MissingProgramError
from kdscale.jobs.launch import commands_for_fewer_hosts, make_request
from kdscale.pipeline.stages.registry import job_targets
from kdscale_launch import Host

HOSTS = "node-1 slots=1\nnode-2 slots=1\n"
Launch = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "my config.yaml"
    path.write_text(
        f"name: My_Run\nrun_dir: {tmp_path}/run\nteacher: {{path: {tmp_path}/none}}\nprune: {{target_params: 50%}}\n"
        "distill: {micro_batch: 1}\n"
    )
    return path


@pytest.fixture
def dry(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Launch:
    """`kdscale launch CONFIG ... --dry-run` → what it printed. Nothing may be written."""
    (tmp_path / "hosts").write_text(HOSTS)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "")

    def launch(*args: str) -> str:
        assert not make_app()(["launch", str(config), *args, "--dry-run"], standalone_mode=False)
        assert not (tmp_path / "run").exists()
        printed = capsys.readouterr().out
        assert "hf_secret" not in printed
        return printed

    return launch


def test_hosts(dry: Launch, config: Path, tmp_path: Path) -> None:
    printed = dry(
        "--hostfile", str(tmp_path / "hosts"), "--set", "teacher.path=/a b", "--master-port", "7", "--python", "/v/py"
    )
    lines = printed.splitlines()
    connections = [shlex.split(line) for line in lines if line.startswith("ssh ")]
    assert [words[-2] for words in connections] == ["node-1", "node-2"]
    assert all(words[-1].endswith("/v/py -m kdscale_launch.hosts.agent") for words in connections)
    rank = next(line for line in lines if line.startswith("/v/py"))
    assert shlex.split(rank)[2:] == ["kdscale.jobs.rank", str(config), "teacher.path=/a b", "distill.processes=2"]
    for variable in ("WORLD_SIZE=2", "MASTER_ADDR=node-1", "MASTER_PORT=7", "HF_TOKEN=***"):
        assert f"#   {variable}" in lines


def test_fewer_hosts(dry: Launch, tmp_path: Path) -> None:
    ssh = ("--hostfile", str(tmp_path / "hosts"), "--min-nodes")
    assert "# when hosts do not come back, also on 1 of 2" in dry(*ssh, "1").splitlines()
    assert "also on" not in dry(*ssh, "2")
    with pytest.raises(ConfigError, match="1 to 2, the number of hosts"):
        dry(*ssh, "3")
    with pytest.raises(ConfigError, match="our own agents"):
        dry(*ssh, "1", "--launcher", "deepspeed")


def test_deepspeed(dry: Launch, tmp_path: Path, config: Path) -> None:
    plain = config.rename(tmp_path / "plain.yaml")
    config.symlink_to(plain)
    ssh = ("--hostfile", str(tmp_path / "hosts"), "--launcher", "deepspeed")
    with pytest.raises(ConfigError, match="--master-port"):
        dry(*ssh)
    with pytest.raises(ConfigError, match="cannot pass the argument"):  # the blank in the config's name
        dry(*ssh, "--master-addr", "node-1", "--master-port", "7")


def test_slurm(dry: Launch) -> None:
    printed = dry("--slurm", "--nodes", "2", "--slots", "2", "--time", "1:00:00", "--sbatch", "partition=gpu")
    assert "#SBATCH --ntasks-per-node=2" in printed
    assert "#SBATCH --partition=gpu" in printed
    assert "distill.processes=4" in printed
    assert printed.splitlines()[-1].startswith("sbatch --parsable ")


def test_kubernetes(dry: Launch) -> None:
    args = ("--kubernetes", "--nodes", "2", "--image", "image", "--volume", "claim:/data", "--secret", "hf")
    text, command = dry(*args).rstrip().rsplit("\n", 1)
    assert command == "kubectl apply -f -"
    listed = json.loads(text)
    assert [item["kind"] for item in listed["items"]] == ["Service", "Job"]
    assert listed["items"][1]["metadata"]["name"] == "kdscale-my-run"
    (job,) = json.loads(dry(*args, "--pytorchjob").rsplit("\nkubectl", 1)[0])["items"]
    assert job["kind"] == "PyTorchJob"


def test_torchrun(dry: Launch, config: Path) -> None:
    words = shlex.split(dry("--torchrun", "--nodes", "2", "--slots", "4", "--master-addr", "node-1"))
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words
    assert "--rdzv-endpoint=node-1:29400" in words
    assert words[-2:] == [str(config), "distill.processes=8"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--hostfile, --slurm, --kubernetes, --torchrun"),
        (("--slurm", "--torchrun"), "got:      --slurm, --torchrun"),
        (("--slurm", "--nodes", "3"), r"global_batch \(8\) must be a multiple"),
        (("--slurm", "--nodes", "2", "--min-nodes", "1"), "fewer nodes need --hostfile"),
        (("--slurm", "--set", "distill.processes=2"), "number of slots"),
        (("--slurm", "--until", "prune"), ", ".join(job_targets())),
        (("--slurm", "--sbatch", "a b\nc"), "not an sbatch option"),
        (("--kubernetes",), "--image"),
        (("--kubernetes", "--image", "i", "--slots", "4", "--gpus", "2"), "expected: 4 a pod"),
        (("--kubernetes", "--image", "i", "--set", "runtime.device=cuda"), "expected: 1 a pod"),
        (("--slurm", "--slots", "4", "--sbatch", "gpus-per-node=h100:2"), "for each of 4 ranks"),
        (("--slurm", "--slots", "4", "--sbatch", "gres=gpu:2"), "for each of 4 ranks"),
        (("--slurm", "--slots", "4", "--nodes", "2", "--sbatch", "gpus=4"), "for each of 8 ranks"),
        (("--slurm", "--prepare", "--nodes", "2", "--sbatch", "gpus=2"), "gpus-per-node=N"),
        (("--torchrun", "--prepare"), "kdscale prune CONFIG on one node"),
        (("--kubernetes", "--image", "i", "--volume", "claim"), "CLAIM:/PATH"),
        (("--hostfile", "/nowhere"), "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_at_once(dry: Launch, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dry(*args)


def test_commands_for_fewer_hosts(config: Path) -> None:
    hosts = [Host(f"node-{number}", 2) for number in range(4)]
    request = make_request(config, ["teacher.path=/a b"], 8, accept_changes=False)
    commands = commands_for_fewer_hosts(request, hosts, 1, "py")
    assert {number: words[-1] for number, words in commands.items()} == {  # 6 ranks cannot share 8 sequences
        1: "distill.processes=2",
        2: "distill.processes=4",
    }
    assert commands[1][-2] == "teacher.path=/a b"
    with pytest.raises(ConfigError, match=r"(?s)--min-nodes 3 .*multiple"):
        commands_for_fewer_hosts(request, hosts, 3, "py")
    with pytest.raises(ConfigError, match=r"(?s)same number of slots.*node-3: 1"):
        commands_for_fewer_hosts(request, [*hosts[:3], Host("node-3", 1)], 1, "py")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("launch", ("--hostfile", "hosts", "--ssh-command", "no-such-ssh", "--skip-preflight")),
        ("launch", ("--slurm",)),
        ("launch", ("--kubernetes", "--image", "image")),
        ("preflight", ("--hostfile", "hosts", "--ssh-command", "no-such-ssh")),
    ],
)
def test_a_program_that_is_missing_is_named_and_is_not_an_error_of_the_run_folder(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: tuple[str, ...]
) -> None:
    (tmp_path / "hosts").write_text("node-1 slots=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgramError, match=r"no-such-ssh|sbatch|kubectl") as caught:
        make_app()([command, str(config), *options], standalone_mode=False)
    assert caught.value.exit_code == 13


def test_slurm_prepares_in_a_job_of_one_node(
    dry: Launch, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--slurm", "--prepare", "--nodes", "2", "--slots", "4", "--sbatch", "gpus-per-node=4")
    printed = dry(*args)
    prepare, job = printed.split("#!/bin/bash")[1:]
    assert "--nodes=1" in prepare and "--ntasks-per-node=1" in prepare and "gpus-per-node=4" in prepare
    assert "--until=prune distill.processes=4" in prepare and "preflight" not in prepare
    assert "--nodes=2" in job and "distill.processes=8" in job and "preflight" in job
    commands = tmp_path / "commands"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {commands}\necho "41;here"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    assert not make_app()(["launch", str(config), *args], standalone_mode=False)
    logs = tmp_path / "run" / "logs"
    assert commands.read_text().splitlines() == [
        f"--parsable {logs}/prepare.sbatch",
        f"--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes {logs}/job.sbatch",
    ]
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {commands}\nexit 3\n')
    assert make_app()(["launch", str(config), *args], standalone_mode=False) == 3
    assert len(commands.read_text().splitlines()) == 3  # no job that waits for none


def test_kubernetes_prepares_first_and_says_what_comes_next(dry: Launch) -> None:
    args = ("--kubernetes", "--nodes", "2", "--slots", "2", "--image", "image", "--gpus", "2", "--prepare")
    text, rest = dry(*args, "--pytorchjob").split("\nkubectl apply", 1)
    _, job = json.loads(text)["items"]
    assert (job["metadata"]["name"], job["spec"]["completions"]) == ("kdscale-my-run-prepare", 1)
    (pod,) = job["spec"]["template"]["spec"]["containers"]
    assert pod["command"][-2:] == ["--until=prune", "distill.processes=2"]
    assert pod["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert rest.splitlines()[-1].endswith("job/kdscale-my-run-prepare")


def test_the_first_host_prepares(dry: Launch, tmp_path: Path) -> None:
    prepare, job = dry("--hostfile", str(tmp_path / "hosts"), "--prepare").split("# restarts", 2)[:2]
    assert "# node-1: ranks 0 to 0" in prepare and "node-2" not in prepare
    assert "--until=prune distill.processes=1" in prepare and "WORLD_SIZE=1" in prepare
    assert "# node-2: ranks 1 to 1" in job and "distill.processes=2" in job and "--until" not in job


def test_who_waits_for_the_first_node_is_told(
    config: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def note(*args: str) -> str:
        make_app()(["launch", str(config), "--slurm", "--dry-run", *args], standalone_mode=False)
        return capsys.readouterr().err

    assert "and the other 4 ranks wait: --prepare" in note("--nodes", "2", "--slots", "4")
    known = ("--set", f"teacher.path={tiny_llama_dir}", "--set", "distill.tokens=10B", "--nodes", "2", "--slots", "4")
    expected = "about 15 min, of which 15 min for text as long as the training; the other 4 ranks wait, 1.0 hours"
    assert expected in note(*known)
    assert note("--nodes", "2", "--slots", "4", "--prepare") == note("--slots", "4") == ""
