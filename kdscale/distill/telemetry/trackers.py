"""Sends the rows of metrics.jsonl to Weights & Biases, MLflow and trackio, each through its own library.

The run folder keeps the id of its run in each tracker, so a restart continues that run. A thread sends the rows, so
training never waits for a tracker. A tracker that fails is reported; after five failures in a row it is disabled.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kdscale.config.root import Config
from kdscale.config.telemetry import MlflowConfig, TrackingConfig, TrackioConfig, WandbConfig
from kdscale.files import read_own_json, sha256_json, write_json
from kdscale.runtime.packages import require_packages
from kdscale.runtime.versions import versions

IDS_FILE = "tracking.json"
_QUEUE_ROWS = 10_000
_FAILURES = 5  # in a row, after which a tracker is disabled
_CLOSE_SECONDS = 60.0
_MLFLOW_BATCH = 100  # params a request may hold


class Tracker(Protocol):
    """One run in one tracker. All calls but the constructor come from one thread; any of them may raise."""

    run_id: str

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send a row; `kind` is "train" or "validation"."""

    def close(self, failed: bool) -> None:
        """End the run there."""


def check_trackers(settings: TrackingConfig) -> None:
    """Raise ConfigError when the library of a configured tracker is not installed; import none of them."""
    for name in TrackingConfig.model_fields:
        if getattr(settings, name) is not None:
            require_packages(f"tracking.{name}", (name,), name, f"set tracking.{name}=null")


class WandbTracker:
    """Weights & Biases. Our step is a column: wandb's own step would refuse rows that a restart logs again."""

    def __init__(self, settings: WandbConfig, run_id: str | None, name: str, facts: Mapping[str, Any], folder: Path):
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            tags=list(settings.tags),
            name=name,
            id=run_id or secrets.token_hex(4),
            resume="allow" if settings.mode == "online" else None,  # `wandb sync` joins offline runs of one id
            dir=str(folder),
            config=dict(facts),
        )
        self.run_id = str(self._run.id)
        for kind in ("train", "validation"):
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send a row with its step as a column."""
        self._run.log({f"{kind}/step": step, **_named(kind, values)})

    def close(self, failed: bool) -> None:
        """Finish the run; a failed one is marked as such."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """MLflow, through its client: mlflow.log_metric would use the current run of the calling thread."""

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
        """Send a row in one request."""
        now = int(time.time() * 1000)
        rows = [self._metric(key, value, now, step) for key, value in _named(kind, values).items()]
        self._client.log_batch(self.run_id, metrics=rows)

    def close(self, failed: bool) -> None:
        """End the run as FINISHED or FAILED."""
        self._client.set_terminated(self.run_id, status="FAILED" if failed else "FINISHED")


class TrackioTracker:
    """trackio, where a run's name is its id."""

    def __init__(self, settings: TrackioConfig, run_id: str | None, name: str, facts: Mapping[str, Any], folder: Path):
        import trackio

        self.run_id = run_id or f"{name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            settings.project, name=self.run_id, space_id=settings.space, config=_flat(facts), resume="allow",
            embed=False,
        )  # fmt: skip

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send a row."""
        self._run.log(_named(kind, values), step=step)

    def close(self, failed: bool) -> None:
        """Finish the run; trackio knows no failed ones."""
        self._run.finish()


_TRACKERS: dict[str, Callable[..., Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}


def open_trackers(cfg: Config, logs: Path, say: Callable[[str], None]) -> Trackers:
    """Start or continue the run in every configured tracker.

    A tracker that fails to start is reported and disabled. The runs' ids are in `logs`/tracking.json; a changed config
    starts new runs.
    """
    # a run folder that was moved goes on in the same runs
    config_hash, stored = sha256_json({**cfg.resolved(), "run_dir": None}), logs / IDS_FILE
    known = read_own_json(stored, _are_ids, say) or {}
    ids: dict[str, str] = dict(known["runs"]) if known.get("config") == config_hash else {}
    facts = {**cfg.resolved(), "versions": versions()}
    trackers: dict[str, Tracker] = {}
    for name, make in _TRACKERS.items():
        settings = getattr(cfg.tracking, name)
        if settings is None:
            continue
        try:
            trackers[name] = make(settings, ids.get(name), cfg.name, facts, logs)
        except Exception as error:  # noqa: BLE001 (of a foreign library; training goes on without it)
            say(f"warning: {name} could not start and is disabled: {_short(error)}")
            continue
        ids[name] = trackers[name].run_id
    if trackers:
        write_json(stored, {"config": config_hash, "runs": ids})
    return Trackers(trackers, say)


def _are_ids(value: Any) -> bool:
    """Whether a JSON value is what `open_trackers` writes."""
    runs = value.get("runs") if isinstance(value, dict) else None
    return isinstance(runs, dict) and all(isinstance(run, str) for run in runs.values())


class Trackers:
    """Queues rows for a thread that sends them to every tracker. Without trackers there is no thread."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]):
        self._say = say
        self._trackers = dict(trackers)
        self._rows: queue.Queue[tuple[str, int, dict[str, float]] | None] = queue.Queue(_QUEUE_ROWS)
        self._dropped, self._failed = 0, False
        self._thread: threading.Thread | None = None
        if trackers:
            self._thread = threading.Thread(target=self._send_rows, name="trackers", daemon=True)
            self._thread.start()

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Queue the numbers among `values`; returns at once. Rows that find the queue full are dropped and counted."""
        if self._thread is None:
            return
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        try:
            self._rows.put_nowait((kind, step, numbers))
        except queue.Full:
            self._dropped += 1

    def close(self, failed: bool = False) -> None:
        """Send what is queued and end the runs there, waiting at most a minute for a tracker that hangs."""
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

    def _send_rows(self) -> None:
        failures = dict.fromkeys(self._trackers, 0)  # in a row
        while (row := self._rows.get()) is not None:
            for name in [name for name, count in failures.items() if count < _FAILURES]:
                failures[name] = 0 if self._send(name, failures[name], *row) else failures[name] + 1
        for name, tracker in self._trackers.items():
            try:
                tracker.close(self._failed)
            except Exception as error:  # noqa: BLE001 (as above)
                self._say(f"warning: {name} could not be finished: {_short(error)}")

    def _send(self, name: str, failures: int, kind: str, step: int, values: Mapping[str, float]) -> bool:
        """Whether the tracker took the row; the first and the last of its failures in a row are reported."""
        try:
            self._trackers[name].log(kind, step, values)
        except Exception as error:  # noqa: BLE001 (as above)
            if failures == 0:
                self._say(f"warning: {name} did not take {kind} step {step}: {_short(error)}")
            elif failures + 1 == _FAILURES:
                self._say(f"warning: {name} failed {_FAILURES} times in a row and is disabled")
            return False
        return True


def _named(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": _plain(value)}
    return out


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
