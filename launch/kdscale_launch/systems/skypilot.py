"""A SkyPilot task as plain values: a managed job that SkyPilot moves to other machines when it loses its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdscale_launch.environment import check_text, check_variables
from kdscale_launch.job import GRACE_SECONDS, STOPPED_EXIT_CODE, LaunchError

_NAME = re.compile(r"[a-zA-Z]([-_.a-zA-Z0-9]{0,60}[a-zA-Z0-9])?")
_PLAIN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._:/@+*-]*")  # no $, which SkyPilot replaces in some fields
_AMOUNT = re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?\+?")  # `8`, or `8+` for at least as many


@dataclass(frozen=True)
class SkyPilotTask:
    """What the machines run. `volumes` maps a mount path to a volume of SkyPilot's, `buckets` one to a bucket's URL.

    `accelerators` is as SkyPilot writes it: `H100:8`. `secrets` names variables whose values SkyPilot takes from the
    environment of whoever submits. Raises LaunchError for a name that SkyPilot would refuse or change, and for control
    characters anywhere.
    """

    name: str
    nodes: int
    slots: int
    command: tuple[str, ...]
    log_dir: str
    cwd: str
    notes: str
    python: str = "python"
    infra: str = ""
    accelerators: str = ""
    image: str = ""
    cpus: str = ""
    memory: str = ""
    spot: bool = False
    disk_gigabytes: int = 0
    setup: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    volumes: Mapping[str, str] = field(default_factory=dict)
    buckets: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    port: int = 29500
    grace: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LaunchError(f"not a name of SkyPilot's: {self.name[:200]!r}; letters, digits and dashes, at most 62")
        plain = {"infra": self.infra, "accelerators": self.accelerators, "image": self.image}
        plain |= {f"the mount {path}": name for path, name in (*self.volumes.items(), *self.buckets.items())}
        for what, text in plain.items():
            if text and not _PLAIN.fullmatch(text):
                raise LaunchError(f"{what}: expected letters, digits and ._:/@+*-, got {text[:200]!r}")
        for what, text in (("cpus", self.cpus), ("memory", self.memory)):
            if text and not _AMOUNT.fullmatch(text):
                raise LaunchError(f"{what}: expected a number such as 8 or 8+, got {text[:200]!r}")
        for path in (*self.volumes, *self.buckets):
            if not path.startswith("/") or "$" in path:
                raise LaunchError(f"expected an absolute path to mount on, without $, got {path[:200]!r}")
        check_text("the SkyPilot task", self.log_dir, self.cwd, self.notes, self.python, *self.command, *self.volumes)
        check_text("the SkyPilot task", *self.buckets, *self.setup.splitlines())
        check_variables(self.env)


def task(job: SkyPilotTask) -> dict[str, Any]:
    """The task, as SkyPilot reads it from a YAML file.

    SkyPilot brings the job back when its machines are lost, and when a node leaves with 75 that nobody asked to stop.
    Any other failure is for whoever submitted it.
    """
    wanted: dict[str, Any] = {
        "infra": job.infra, "accelerators": job.accelerators, "cpus": job.cpus, "memory": job.memory,
        "image_id": job.image, "disk_size": job.disk_gigabytes,
    }  # fmt: skip
    resources: dict[str, Any] = {name: value for name, value in wanted.items() if value}
    resources["use_spot"] = job.spot
    resources["job_recovery"] = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [STOPPED_EXIT_CODE]}
    whole: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": resources,
        "envs": dict(job.env),
        "volumes": dict(job.volumes),
        "file_mounts": {path: {"source": source, "mode": "MOUNT"} for path, source in job.buckets.items()},
        "setup": job.setup,
        "run": _run(job),
    }
    return {name: value for name, value in whole.items() if value}


def _run(job: SkyPilotTask) -> str:
    """The script of each node: its rank and the first node's address come from SkyPilot's variables."""
    node = [job.python, "-m", "kdscale_launch.systems.node", "--nodes", str(job.nodes), "--slots", str(job.slots)]
    node += ["--node-rank-from", "SKYPILOT_NODE_RANK", "--master-port", str(job.port), "--log-dir", job.log_dir]
    node += ["--grace", f"{job.grace:g}", "--notes", job.notes, "--", *job.command]
    return "\n".join(
        [
            f"cd {shlex.quote(job.cwd)} || exit 1",
            'MASTER_ADDR=$(printf "%s\\n" "$SKYPILOT_NODE_IPS" | head -n 1)',
            "export MASTER_ADDR",
            f"exec {shlex.join(node)}",
            "",
        ]
    )
