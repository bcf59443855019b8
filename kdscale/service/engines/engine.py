"""What an engine is: it starts a run somewhere, tells how it is, and stops it. Nothing here knows where.

An engine keeps nothing in memory that matters: a service that was killed makes the same engine again and asks it about
the same handles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from kdscale.errors import ConfigError, MachineError
from kdscale.service.engines.targets import check_settings
from kdscale.service.settings import ServiceSettings

# Where each engine is; a module is imported when a run first asks for it.
ENGINES: Mapping[str, str] = {
    "local": "kdscale.service.engines.local:LocalEngine",
    "hosts": "kdscale.service.engines.hosts:HostsEngine",
    "slurm": "kdscale.service.engines.slurm:SlurmEngine",
    "kubernetes": "kdscale.service.engines.kubernetes:KubernetesEngine",
    "skypilot": "kdscale.service.engines.skypilot:SkyPilotEngine",
}


@dataclass(frozen=True)
class Job:
    """One attempt at a run.

    `folder` is the run folder and `config` its config.yaml as it was submitted. `work` is this attempt's own folder, in
    which an engine keeps what it must remember. `devices` are the devices of this machine that the attempt may use;
    empty where the engine chooses them, or there are none. `target` holds the engine's own settings of the run.
    """

    run_id: str
    attempt: int
    folder: Path
    config: Path
    work: Path
    slots: int = 1
    devices: tuple[str, ...] = ()
    target: Mapping[str, Any] | None = None
    name: str = ""
    owner: str = ""


@dataclass(frozen=True)
class JobState:
    """How an attempt is.

    waiting: it was handed over and has not begun. running: it has. ended: it left with `exit_code` (as a shell has it:
    128 + n for signal n). lost: it is gone and nobody knows how it ended. `reason` is for people; it may be empty.
    """

    phase: Literal["waiting", "running", "ended", "lost"]
    exit_code: int | None = None
    reason: str = ""


class EngineUnavailableError(MachineError):
    """A system that does not answer now. It says nothing about any attempt: the same call is made again later."""


class Engine(Protocol):
    """Every call returns soon, may be made again, and may come from another process than the one before."""

    name: str

    def submit(self, job: Job) -> str:
        """Start the attempt and return its handle; called again for the same (run, attempt) it starts nothing.

        Raises EngineUnavailableError when it may be submitted again, and any other KdscaleError when the attempt cannot
        be started here, as it is or at all.
        """

    def state(self, handle: str) -> JobState:
        """How the attempt is now. Raises KdscaleError when that cannot be found out, which says nothing about it."""

    def logs(self, handle: str, tail_bytes: int) -> bytes:
        """The last bytes of what it printed; empty where there is nothing yet."""

    def cancel(self, handle: str, *, grace: float) -> None:
        """SIGTERM now and SIGKILL after `grace` seconds; returns at once. Exit code 75 tells that all was saved."""

    def requeue(self, handle: str, job: Job) -> str:
        """Start the next attempt after one that ended; returns the new handle."""


def make_engine(name: str, settings: ServiceSettings) -> Engine:
    """The engine of this name, made from the service's settings. Raises ConfigError for a name that is none."""
    if name not in ENGINES:
        raise ConfigError("target.engine", expected=f"one of {', '.join(ENGINES)}", got=repr(name))
    module, _, attribute = ENGINES[name].partition(":")
    engine: Engine = getattr(import_module(module), attribute)(settings)
    return engine


class Engines(Mapping[str, Engine]):
    """All engines by name, each made when it is first asked for. Raises ConfigError for settings that none takes."""

    def __init__(self, settings: ServiceSettings):
        check_settings(settings.engines)
        self._settings, self._made = settings, dict[str, Engine]()

    def __getitem__(self, name: str) -> Engine:
        if name not in self._made:
            self._made[name] = make_engine(name, self._settings)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ENGINES)

    def __len__(self) -> int:
        return len(ENGINES)
