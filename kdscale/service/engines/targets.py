"""Where a run is to go: one model for each engine, and what the service's settings say where a run's target does not.

A field marked ADMIN names code, secrets, storage or whom the work is charged to: `admin_fields` lists those that a
target sets, and only an admin may.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from kdscale.config.fields import Few, Name, Seconds, Section, explain_errors
from kdscale.errors import ConfigError, raise_together

ADMIN = "admin"
_Text = Annotated[str, Field(max_length=500)]
_Nodes = Annotated[int, Field(ge=1, le=10_000)]
_Gpus = Annotated[int, Field(ge=0, le=1024)]


class LocalTarget(Section):
    """This machine."""

    engine: Literal["local"] = "local"


class HostsTarget(Section):
    """Machines that the service reaches by ssh, as `kdscale launch --hostfile` does.

    `hostfile` is a file on the service's machine.
    """

    engine: Literal["hosts"] = "hosts"
    hostfile: Annotated[str, ADMIN] = ""
    min_nodes: Few | None = None  # go on with as few hosts as this when others do not come back


class SlurmTarget(Section):
    """A Slurm cluster. `extra` are more options of sbatch, such as `qos=high`."""

    engine: Literal["slurm"] = "slurm"
    partition: Annotated[str, Field(pattern=r"^([A-Za-z0-9_.,-]{1,200})?$")] = ""
    account: Annotated[str, Field(pattern=r"^([A-Za-z0-9_.-]{1,200})?$"), ADMIN] = ""
    nodes: _Nodes = 1
    gpus_per_node: _Gpus = 0
    processes_per_node: Few | None = None  # None: one for each GPU, at least one
    time: Annotated[str, Field(max_length=40)] = ""  # D-HH:MM:SS
    extra: Annotated[tuple[str, ...], ADMIN] = ()

    @property
    def slots_per_node(self) -> int:
        """Ranks on each node."""
        return self.processes_per_node or max(1, self.gpus_per_node)


class KubernetesTarget(Section):
    """A Kubernetes cluster with the JobSet controller, and with Kueue where `queue` (a LocalQueue) is given.

    `volumes` maps claims to the paths that they are mounted on; one of them holds the service's home folder, under the
    path that it has here.
    """

    engine: Literal["kubernetes"] = "kubernetes"
    namespace: Annotated[str, ADMIN] = "default"
    image: Annotated[_Text, ADMIN] = ""
    queue: Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")] = ""
    priority: Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"), ADMIN] = ""
    nodes: _Nodes = 1
    gpus: _Gpus = 0  # of each node
    processes_per_node: Few | None = None
    cpu: Annotated[str, Field(max_length=20)] = ""  # that each pod asks for, as Kubernetes writes it
    memory: Annotated[str, Field(max_length=20)] = ""
    volumes: Annotated[dict[str, str], ADMIN] = Field(default_factory=dict)
    secrets: Annotated[tuple[str, ...], ADMIN] = ()  # whose keys become variables

    @property
    def slots_per_node(self) -> int:
        """Ranks on each node."""
        return self.processes_per_node or max(1, self.gpus)


class SkyPilotTarget(Section):
    """Machines that SkyPilot finds. `volumes` and `buckets` map mount paths to volumes and to addresses of buckets.

    One of them holds the service's home folder, under the path that it has here.
    """

    engine: Literal["skypilot"] = "skypilot"
    infra: Annotated[str, Field(max_length=200)] = ""  # aws/us-east-1, k8s/context; empty: the cheapest
    accelerators: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,60}(:[0-9]{1,4})?)?$")] = ""  # H100:8
    nodes: _Nodes = 1
    processes_per_node: Few | None = None
    spot: bool = False
    cpus: Annotated[str, Field(max_length=20)] = ""
    memory: Annotated[str, Field(max_length=20)] = ""
    disk_gigabytes: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    image: Annotated[_Text, ADMIN] = ""
    setup: Annotated[str, Field(max_length=4096), ADMIN] = ""  # a command that makes a machine ready
    volumes: Annotated[dict[str, str], ADMIN] = Field(default_factory=dict)
    buckets: Annotated[dict[str, str], ADMIN] = Field(default_factory=dict)
    secrets: Annotated[tuple[str, ...], ADMIN] = ()  # names of the service's variables that the machines get

    @property
    def slots_per_node(self) -> int:
        """Ranks on each node: one for each accelerator of `H100:8`."""
        count = self.accelerators.partition(":")[2]
        return self.processes_per_node or max(1, int(count or 1))


class EngineSettings(Section):
    """How the service uses an engine, whatever a run asks for.

    `slots` is how many processes all runs on it may have at once. `python` is the interpreter where the ranks run,
    `cwd` the folder that relative paths of a config count from (None: the service's own). The system is asked about a
    job every `poll_seconds`; one call of its program may take `command_seconds`. A job that the system does not know
    for `patience` seconds is lost. `export` names more variables that the ranks get.
    """

    slots: Few | None = None
    python: _Text = sys.executable
    cwd: str | None = None
    export: tuple[Name, ...] = ()
    command_seconds: Annotated[float, Field(gt=0.0, le=3600.0)] = 30.0
    poll_seconds: Seconds = 10.0
    patience: Seconds = 180.0
    restarts: Annotated[int, Field(ge=0, le=1000)] = 3  # that the engine itself makes of a broken job


class LocalSettings(EngineSettings, LocalTarget):
    """See the bases."""


class HostsSettings(EngineSettings, HostsTarget):
    """`ssh_command` is used instead of ssh, with its options. `master_addr`: where ranks find the first host."""

    ssh_command: str = "ssh"
    master_addr: str = ""  # empty: the first host's name
    dead_after: Seconds = 15.0
    connect_seconds: Seconds = 30.0
    host_seconds: Seconds = 300.0


class SlurmSettings(EngineSettings, SlurmTarget):
    """`warn` seconds before the time limit the ranks are told to save."""

    warn: Annotated[int, Field(ge=1, le=86_400)] = 300
    check: bool = True  # all ranks add up a number first


class KubernetesSettings(EngineSettings, KubernetesTarget):
    """`context` is that of kubectl (None: the current one)."""

    python: _Text = "python"
    context: str | None = None
    grace: Seconds = 120.0  # that a pod has when it is moved away


class SkyPilotSettings(EngineSettings, SkyPilotTarget):
    """SkyPilot takes minutes to start its controller and to show a job that it has accepted."""

    python: _Text = "python"
    poll_seconds: Seconds = 30.0
    patience: Seconds = 1800.0
    grace: Seconds = 120.0


TARGETS: Mapping[str, type[Section]] = {
    "local": LocalTarget,
    "hosts": HostsTarget,
    "slurm": SlurmTarget,
    "kubernetes": KubernetesTarget,
    "skypilot": SkyPilotTarget,
}
SETTINGS: Mapping[str, type[EngineSettings]] = {
    "local": LocalSettings,
    "hosts": HostsSettings,
    "slurm": SlurmSettings,
    "kubernetes": KubernetesSettings,
    "skypilot": SkyPilotSettings,
}
Target = Annotated[
    LocalTarget | HostsTarget | SlurmTarget | KubernetesTarget | SkyPilotTarget, Field(discriminator="engine")
]
_TARGET: TypeAdapter[Any] = TypeAdapter(Target)


def read_target(target: Mapping[str, Any] | None, settings: Section | None = None) -> Any:
    """The target as its model, with `settings` for what it leaves out; none at all is this machine.

    Raises ConfigError that names every wrong field.
    """
    given = {"engine": "local", **(target or {})}
    model = TARGETS.get(str(given["engine"]))
    if model is None:
        raise ConfigError("target.engine", expected=f"one of {', '.join(TARGETS)}", got=repr(given["engine"])[:200])
    rest = settings.model_dump(mode="json", include=set(model.model_fields)) if settings is not None else {}
    return _read(model, {**rest, **given}, "target")


def read_settings(engine: str, engines: Mapping[str, Mapping[str, Any]]) -> Any:
    """The settings of an engine from ServiceSettings.engines. Raises ConfigError that names every wrong field."""
    return _read(SETTINGS[engine], {**engines.get(engine, {}), "engine": engine}, f"engines.{engine}")


def check_settings(engines: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError that names every wrong setting of every engine."""
    problems = []
    for name in engines:
        try:
            if name not in SETTINGS:
                raise ConfigError(f"engines.{name}", expected=f"one of {', '.join(SETTINGS)}")
            read_settings(name, engines)
        except ConfigError as error:
            problems.append(error)
    raise_together(problems)


def processes_of(target: Mapping[str, Any] | None, engines: Mapping[str, Mapping[str, Any]]) -> int | None:
    """How many processes a target starts on its nodes together; None where the target does not say."""
    read = read_target(target, read_settings(str((target or {}).get("engine", "local")), engines))
    return (
        read.nodes * read.slots_per_node if isinstance(read, SlurmTarget | KubernetesTarget | SkyPilotTarget) else None
    )


def admin_fields(target: Mapping[str, Any] | None) -> list[str]:
    """The fields of a target that only an admin may set, as `target.image`; a wrong target has none."""
    model = TARGETS.get(str((target or {}).get("engine", "local")))
    if target is None or model is None:
        return []
    marked = {name for name, item in model.model_fields.items() if ADMIN in item.metadata}
    return sorted(f"target.{name}" for name in marked & set(target))


def target_schema() -> dict[str, Any]:
    """The JSON schema of all targets, for OpenAPI and for forms."""
    return _TARGET.json_schema()


def _read(model: type[Section], values: Mapping[str, Any], where: str) -> Any:
    try:
        # by way of JSON, where a strict model takes lists for tuples
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}.{line}" for line in explain_errors(error, model))) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(where, expected="plain values", got=str(error)[:200]) from error
