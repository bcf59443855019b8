"""The rows of metrics.jsonl for Weights & Biases, MLflow and trackio, each through its own library.

A run folder remembers the id of its run in each tracker, so a restart goes on with it. Rows wait in a queue for a
thread: training never waits for a tracker, and a tracker that fails is said and, when it fails on and on, left out.
"""

from __future__ import annotations

import importlib.util
import platform
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from kdscale.config.root import Config
from kdscale.config.telemetry import MlflowConfig, TrackingConfig, TrackioConfig, WandbConfig
from kdscale.errors import ConfigError
from kdscale.files import read_json, sha256_json, write_json

IDS_FILE = "tracking.json"


_QUEUE_ROWS = 10_000


_FAILURES = 5  # in a row, after which a tracker is left out


_CLOSE_SECONDS = 60.0


_MLFLOW_BATCH = 100  # params a request may hold


class Tracker(Protocol):
    """One run in one tracker. All calls but the constructor come from one thread."""

    run_id: str

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_trackers(settings: TrackingConfig) -> None:
    """Raises ConfigError when the library of a configured tracker is not installed; imports none of them."""
    for name in TrackingConfig.model_fields:
        if getattr(settings, name) is not None and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name}", expected=f"the {name} library", got="it is not installed",
                hint=f"pip install 'kdscale[{name}]', or set tracking.{name}=null",
            )  # fmt: skip


class WandbTracker:
    """A step is a value of its own, not wandb's: rows that a restart logs again would be refused as too old."""

    def __init__(self, settings: WandbConfig, run_id: str | None, name: str, facts: Mapping[str, Any], folder: Path):
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            tags=list(settings.tags),
            name=name,
            id=run_id or secrets.token_hex(4),
            resume="allow" if settings.mode == "online" else None,  # offline runs of one id meet in `wandb sync`
            dir=str(folder),
            config=dict(facts),
        )
        self.run_id = str(self._run.id)
        for kind in ("train", "validation"):
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{kind}/step": step, **_named(kind, values)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """Through the client, which has no current run: mlflow's own is a matter of the thread."""

    def __init__(self, settings: MlflowConfig, run_id: str | None, name: str, facts: Mapping[str, Any], folder: Path):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=settings.uri)
        if run_id is None:
            experiment = self._client.get_experiment_by_name(settings.experiment)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(
                settings.experiment
            )  # fmt: skip
            run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
            params = [Param(key, str(value)) for key, value in _flat(facts).items()]
            for start in range(0, len(params), _MLFLOW_BATCH):
                self._client.log_batch(run_id, params=params[start : start + _MLFLOW_BATCH])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = str(run_id)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        rows = [self._metric(key, value, now, step) for key, value in _named(kind, values).items()]
        self._client.log_batch(self.run_id, metrics=rows)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.run_id, status="FAILED" if failed else "FINISHED")


class TrackioTracker:
    """A run's name is its id there."""

    def __init__(self, settings: TrackioConfig, run_id: str | None, name: str, facts: Mapping[str, Any], folder: Path):
        import trackio

        self.run_id = run_id or f"{name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            settings.project, name=self.run_id, space_id=settings.space, config=_flat(facts), resume="allow",
            embed=False,
        )  # fmt: skip

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log(_named(kind, values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[..., Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker, "trackio": TrackioTracker}


def open_trackers(cfg: Config, logs: Path, say: Callable[[str], None]) -> Trackers:
    """Start, or go on with, the run in every configured tracker; one that cannot start is said and left out.

    The ids are in `logs`/tracking.json. Another config than the one they were made with begins new runs.
    """
    made_from, stored = sha256_json(cfg.resolved()), logs / IDS_FILE
    known = read_json(stored) if stored.exists() else {}
    ids: dict[str, str] = dict(known["runs"]) if known.get("config") == made_from else {}
    facts = {**cfg.resolved(), "versions": _versions()}
    found: dict[str, Tracker] = {}
    for name, make in _KINDS.items():
        settings = getattr(cfg.tracking, name)
        if settings is None:
            continue
        try:
            found[name] = make(settings, ids.get(name), cfg.name, facts, logs)
        except Exception as error:  # noqa: BLE001 (a foreign library's; its failure is no reason not to train)
            say(f"warning: {name} could not start and gets nothing: {_short(error)}")
            continue
        ids[name] = found[name].run_id
    if found:
        write_json(stored, {"config": made_from, "runs": ids})
    return Trackers(found, say)


class Trackers:
    """Hands rows to a thread that hands them to every tracker. Without trackers there is no thread."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]):
        self._say = say
        self._trackers = dict(trackers)
        self._rows: queue.Queue[tuple[str, int, dict[str, float]] | None] = queue.Queue(_QUEUE_ROWS)
        self._dropped, self._failed = 0, False
        self._thread: threading.Thread | None = None
        if trackers:
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Numbers only; returns at once. Rows beyond a full queue are counted and said at the end."""
        if self._thread is None:
            return
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        try:
            self._rows.put_nowait((kind, step, numbers))
        except queue.Full:
            self._dropped += 1

    def close(self, failed: bool = False) -> None:
        """Send what waits and end the runs there; a tracker that hangs is left behind after a minute."""
        if self._thread is None:
            return
        self._failed = failed
        deadline = time.monotonic() + _CLOSE_SECONDS
        try:
            self._rows.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            self._dropped += 1
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._say(f"warning: {', '.join(self._trackers)} did not finish in {_CLOSE_SECONDS:.0f} s")
        if self._dropped:
            self._say(f"warning: {self._dropped} rows were not sent: {', '.join(self._trackers)} took too long")
        self._thread = None

    def _work(self) -> None:
        bad = dict.fromkeys(self._trackers, 0)
        while (row := self._rows.get()) is not None:
            for name in [name for name, failures in bad.items() if failures < _FAILURES]:
                bad[name] = bad[name] + 1 if self._failed_at(name, bad[name], *row) else 0
        for name, tracker in self._trackers.items():
            try:
                tracker.close(self._failed)
            except Exception as error:  # noqa: BLE001 (as above)
                self._say(f"warning: {name} could not be finished: {_short(error)}")

    def _failed_at(self, name: str, before: int, kind: str, step: int, values: Mapping[str, float]) -> bool:
        try:
            self._trackers[name].log(kind, step, values)
        except Exception as error:  # noqa: BLE001 (as above)
            if before == 0:
                self._say(f"warning: {name} did not take {kind} step {step}: {_short(error)}")
            elif before + 1 == _FAILURES:
                self._say(f"warning: {name} failed {_FAILURES} times in a row and gets nothing more")
            return True
        return False


def _named(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": _plain(value)}
    return out


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _versions() -> dict[str, str]:
    names: Sequence[str] = ("kdscale", "torch", "transformers", "deepspeed")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a source tree that was never installed
            found[name] = "not installed as a package"
    return found


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
