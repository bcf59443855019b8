"""Launch a run over two hosts in network namespaces, each with an sshd; then break it in seven ways and compare.

    sudo python benchmarks/faults/two_hosts.py --work /tmp/two-hosts  # a tiny random model, seven faults
    sudo python benchmarks/faults/two_hosts.py --work /tmp/hosts --config C.yaml --faults host --set distill.tokens=60k

Needs root, iproute2 and openssh-server. The hosts share this machine's disk and CPUs; their networks, sshds and process
groups are their own. Prints for every fault what happened, the step from which training went on, the seconds until it
passed the step it had reached, and whether the student has the bytes of the unbroken run. `--single` compares the loss
curve with that of one process. Leaves with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kill_resume import digests

from kdscale.config.load import load_config
from kdscale.jobs.launch import RANK_MODULE
from kdscale.pipeline import rank_main
from kdscale.runs.metrics_log import read_metrics
from kdscale_launch.hosts import agent

BRIDGE, NETWORK, SSH_PORT = "kdbr0", "10.77.0", 2222
DEAD_AFTER = 8.0
FAULTS = ("rank", "agent", "host", "link", "launcher", "sigterm", "checkpoint")


def sh(*command: str, check: bool = True) -> str:
    """What the command prints; ends this program when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


class HostInNamespace:
    """One host: a network namespace on the bridge with an sshd that has keys of its own."""

    def __init__(self, number: int, work: Path):
        self.name, self.address = f"kdhost{number}", f"{NETWORK}.{number + 1}"
        self.link, self.peer = f"kdv{number}", f"kdp{number}"
        self.folder = work / self.name
        self.sshd: subprocess.Popen[bytes] | None = None

    def build(self, authorised: Path) -> None:
        """Make the namespace and its link, and start the sshd."""
        self.folder.mkdir(parents=True)
        sh("ip", "netns", "add", self.name)
        sh("ip", "link", "add", self.link, "type", "veth", "peer", "name", self.peer)
        sh("ip", "link", "set", self.link, "master", BRIDGE, "up")
        sh("ip", "link", "set", self.peer, "netns", self.name)
        for command in (f"addr add {self.address}/24 dev {self.peer}", f"link set {self.peer} up", "link set lo up"):
            sh("ip", "-n", self.name, *command.split())
        key = self.folder / "host_key"
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        settings = {
            "Port": SSH_PORT, "ListenAddress": self.address, "HostKey": key, "AuthorizedKeysFile": authorised,
            "PidFile": self.folder / "pid", "StrictModes": "no", "UsePAM": "no", "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password", "MaxStartups": "50",
        }  # fmt: skip
        (self.folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        self.boot()

    def boot(self) -> None:
        """Start the sshd."""
        Path("/run/sshd").mkdir(exist_ok=True)
        command = ["ip", "netns", "exec", self.name, "/usr/sbin/sshd", "-D", "-f", str(self.folder / "sshd_config")]
        self.sshd = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def pids(self) -> list[int]:
        """All processes of this host."""
        return [int(pid) for pid in sh("ip", "netns", "pids", self.name, check=False).split()]

    def pids_of(self, word: str) -> list[int]:
        """The processes of this host with `word` in their command line."""
        return [pid for pid in self.pids() if word in _command_line(pid)]

    def kill_everything(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.sshd is not None:
            self.sshd.wait()

    def network(self, state: str) -> None:
        """Set the link `up` or `down`."""
        sh("ip", "link", "set", self.link, state)

    def destroy(self) -> None:
        self.kill_everything()
        sh("ip", "netns", "del", self.name, check=False)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def two_hosts(work: Path) -> Iterator[tuple[list[HostInNamespace], list[str]]]:
    """Build two hosts; yields them and the options by which kdscale launch reaches them."""
    hosts = [HostInNamespace(1, work), HostInNamespace(2, work)]
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        key = work / "user_key"
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        for host in hosts:
            host.build(key.with_suffix(".pub"))
        known = "".join(f"[{host.address}]:{SSH_PORT} {(host.folder / 'host_key.pub').read_text()}" for host in hosts)
        (work / "known_hosts").write_text(known)
        (work / "ssh_config").write_text(
            f"Port {SSH_PORT}\nIdentityFile {key}\nUserKnownHostsFile {work / 'known_hosts'}\n"
            "StrictHostKeyChecking yes\nIdentitiesOnly yes\n"
        )
        (work / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        yield hosts, ["--hostfile", str(work / "hostfile"), "--ssh-command", f"ssh -F {work / 'ssh_config'}"]
    finally:
        for host in hosts:
            host.destroy()
        sh("ip", "link", "del", BRIDGE, check=False)


class TwoHostRun:
    """One `kdscale launch` into its own run folder."""

    def __init__(self, arguments: argparse.Namespace, name: str, reach: list[str]):
        self.run = Path(arguments.work) / name
        self.command = [
            sys.executable, "-m", "kdscale.cli.main", "launch", arguments.config, *reach, "--until", "distill",
            "--dead-after", str(DEAD_AFTER), "--skip-preflight", *settings(arguments, self.run),
        ]  # fmt: skip
        self.log = Path(arguments.work) / f"{name}.log"
        self.restarted: subprocess.Popen[bytes] | None = None  # the second launcher, after a fault that ended the first

    def start(self) -> subprocess.Popen[bytes]:
        """Start the launcher."""
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log)

    def steps(self) -> int:
        """The newest step in the metrics log."""
        rows = read_metrics(self.run / "logs" / "metrics.jsonl")
        return max((int(row["step"]) for row in rows if row["kind"] == "train"), default=0)

    def losses(self) -> list[float]:
        """The loss of every step."""
        return [row["loss"] for row in read_metrics(self.run / "logs" / "metrics.jsonl") if row["kind"] == "train"]

    def student(self) -> dict[str, str]:
        """SHA-256 of every file of the student, by name."""
        return digests(self.run / "student")


def settings(arguments: argparse.Namespace, run: Path) -> list[str]:
    """`--set` options for a run in this folder."""
    return [word for item in (*arguments.set, f"run_dir={run}") for word in ("--set", item)]


def wait(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for the condition; returns the seconds it took. Ends this program after `seconds`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise SystemExit(f"still waiting after {seconds:.0f} s for {what}")
        time.sleep(0.05)
    return time.monotonic() - began


def inject(fault: str, job: TwoHostRun, hosts: list[HostInNamespace], process: subprocess.Popen[bytes]) -> str:
    """Inject the fault, on the second host; returns what happened."""
    victim = hosts[1]
    if fault == "rank":
        return f"killed {kill(victim.pids_of(RANK_MODULE))}"
    if fault == "agent":
        kill(victim.pids_of(agent.__name__))
        seconds = wait(lambda: not victim.pids_of(RANK_MODULE), 30, "the agent's rank to die with it")
        return f"its rank ended after {seconds:.1f} s"
    if fault == "host":
        victim.kill_everything()
        time.sleep(3.0)  # the host boots
        victim.boot()
        return "every process of the host killed; sshd back after 3 s"
    if fault == "link":
        victim.network("down")
        seconds = wait(lambda: not victim.pids_of("kdscale"), 60, "the cut-off host's agent to end its rank")
        victim.network("up")
        return f"cut-off rank ended after {seconds:.1f} s, then link up"
    if fault == "checkpoint":
        kill(victim.pids_of(RANK_MODULE))
        # the newest checkpoint is final only when rank 0's training has ended; the restart takes longer than this
        wait(lambda: not hosts[0].pids_of(rank_main.__name__), 60, "rank 0 to end")
        newest = max((job.run / "checkpoints").glob("step-*"))
        biggest = max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        biggest.write_bytes(biggest.read_bytes()[:-64])
        return f"rank killed, {newest.name} damaged"
    process.send_signal(signal.SIGKILL if fault == "launcher" else signal.SIGTERM)
    code = process.wait()
    ended = wait(lambda: not any(host.pids_of("kdscale") for host in hosts), 60, "everything to end")
    job.restarted = job.start()
    return f"launcher left with {code}, hosts empty {ended:.1f} s later, same command again"


def kill(pids: list[int]) -> list[int]:
    """Kill these processes; ends this program when there are none."""
    if not pids:
        raise SystemExit("there is no process to kill")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return pids


def broken_run(fault: str, job: TwoHostRun, hosts: list[HostInNamespace], at: int) -> dict[str, object]:
    """Run the job, break it at step `at`, and wait for its end; returns a row of figures."""
    process = job.start()
    wait(lambda: job.steps() >= at or process.poll() is not None, 900, f"step {at}")
    if process.poll() is not None:
        raise SystemExit(f"the run ended before its fault; see {job.log}")
    before, began = job.steps(), time.monotonic()
    event = inject(fault, job, hosts, process)
    reached = max(before, job.steps())
    process = job.restarted or process
    wait(lambda: job.steps() > reached or process.poll() is not None, 600, "training to go on")
    seconds = time.monotonic() - began
    code = process.wait()
    went_on = [int(step) for step in re.findall(r"going on from step (\d+)", job.log.read_text(errors="replace"))]
    return {
        "fault": fault, "at step": reached, "event": event, "went on from step": went_on,
        "training again after": round(seconds, 1), "exit code": code,
    }  # fmt: skip


def single_process(arguments: argparse.Namespace, unbroken: TwoHostRun) -> float:
    """The largest relative difference between the loss curves of two hosts and of one process."""
    job = TwoHostRun(arguments, "single", [])
    command = [sys.executable, "-m", "kdscale.cli.main", "distill", arguments.config, *settings(arguments, job.run)]
    with job.log.open("ab") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)
    pairs = list(zip(job.losses(), unbroken.losses(), strict=True))
    return max(abs(left - right) / abs(left) for left, right in pairs)


def main() -> int:
    """Run unbroken and broken; returns the exit code."""
    arguments = parse()
    work = Path(arguments.work)
    if os.geteuid() != 0 or not shutil.which("ip") or not Path("/usr/sbin/sshd").exists():
        raise SystemExit("needs root, iproute2 (ip) and openssh-server (/usr/sbin/sshd)")
    work.mkdir(parents=True)
    arguments.config = arguments.config or str(tiny_config(work))
    differing = 0
    with two_hosts(work) as (hosts, reach):
        unbroken = TwoHostRun(arguments, "unbroken", reach)
        began = time.monotonic()
        if code := unbroken.start().wait():
            raise SystemExit(f"the unbroken run left with {code}; see {unbroken.log}")
        expected, steps = unbroken.student(), unbroken.steps()
        print(
            f"unbroken run: {time.monotonic() - began:.0f} s, {steps} steps, loss {unbroken.losses()[-1]:.5f}",
            flush=True,
        )
        if arguments.single:
            difference = single_process(arguments, unbroken)
            print(f"one process: loss differs by at most {difference:.2e} (relative) over {steps} steps", flush=True)
            differing += difference > arguments.tolerance
        for fault in arguments.faults:
            job = TwoHostRun(arguments, f"broken-{fault}", reach)
            row = broken_run(fault, job, hosts, arguments.at or steps // 2)
            same = job.student() == expected if row["exit code"] == 0 else False
            print(json.dumps({**row, "student": "same bytes" if same else "DIFFERS"}), flush=True)
            differing += not same
    return min(1, differing)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, help="a folder that does not exist yet")
    parser.add_argument("--config", help="default: a tiny random Llama made on the spot")
    parser.add_argument("--faults", nargs="*", default=FAULTS, choices=FAULTS)
    parser.add_argument("--at", type=int, help="the step at which to break it (default: half of all)")
    parser.add_argument("--single", action="store_true", help="also run it in one process and compare the losses")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="for --single, relative")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def tiny_config(work: Path) -> Path:
    """A random Llama of 0.3 M parameters, its byte-level tokenizer and generated text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|end|>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(11)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=128, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, vocab_size=257, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, initializer_range=0.12,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(
        work / "teacher"
    )
    lines = (f"Sentence {n} says that {n * n} is the square of {n} and nothing else at all." for n in range(400))
    (work / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    path = work / "tiny.yaml"
    path.write_text(TINY.format(work=work))
    load_config(path)
    return path


TINY = """
name: tiny
run_dir: unused
teacher: {{path: {work}/teacher}}
data: {{sources: [{{path: {work}/text.jsonl}}], heldout_fraction: 0.1}}
importance: {{calibration_tokens: 512, seq_len: 64, micro_batch: 2, dtype: float32}}
prune: {{ffn: 64, heads: 4}}
distill:
  tokens: 15360
  seq_len: 64
  global_batch: 4
  micro_batch: 2
  dtype: float32
  zero_stage: 3
  optimizer: {{lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}}
  objectives: [{{name: token_divergence, top_k: 16}}]
  validate_every: 20
  validate_tokens: 128
  checkpoint_every: 5
runtime: {{device: cpu, threads: 1}}
"""

if __name__ == "__main__":
    raise SystemExit(main())
