"""Trackers: what they are sent, that a restart continues their runs, and that no failure of theirs ends a training."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.distill.telemetry.trackers import IDS_FILE, Trackers, check_trackers, open_trackers
from kdscale.errors import ConfigError
from kdscale.files import read_json


def config(run_dir: Path, **tracking: Any) -> Config:
    tree = {
        "name": "tiny", "run_dir": str(run_dir), "teacher": {"path": "t"}, "prune": {"target_params": "50%"},
        "tracking": tracking,
    }  # fmt: skip
    return build_config(tree, "test")


class Recorder(ModuleType):
    """Stands in for a tracker's library: every call is written down in order."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def note(self, name: str, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args or kwargs))
            return result

        return call

    def of(self, name: str) -> list[Any]:
        return [what for call, what in self.calls if call == name]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module = Recorder("wandb")

    def init(**given: Any) -> Any:
        module.calls.append(("init", given))
        return SimpleNamespace(
            id=given["id"], define_metric=module.note("define"), log=module.note("log"), finish=module.note("finish")
        )

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module = Recorder("trackio")

    def init(project: str, **given: Any) -> Any:
        module.calls.append(("init", {"project": project, **given}))
        return SimpleNamespace(log=module.note("log"), finish=module.note("finish"))

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_rows_go_to_every_tracker_and_a_restart_goes_on_with_the_same_runs(
    tmp_path: Path, wandb: Recorder, trackio: Recorder
) -> None:
    cfg, said = config(tmp_path, wandb={"mode": "offline"}, trackio={"project": "mine"}), []
    for step in (1, 2):
        trackers = open_trackers(cfg, tmp_path, said.append)
        trackers.log("train", step, {"loss": 1.5, "skipped": 0, "documents": "3 (web)"})
        trackers.close()
    assert said == []
    first, second = wandb.of("init")
    assert first["id"] == second["id"] == read_json(tmp_path / IDS_FILE)["runs"]["wandb"]
    assert first["config"]["prune"]["target_params"] == "50%" and "python" in first["config"]["versions"]
    assert wandb.of("log")[0] == ({"train/step": 1, "train/loss": 1.5, "train/skipped": 0.0},)
    assert wandb.of("finish") == [{"exit_code": 0}] * 2
    one, two = trackio.of("init")
    assert (one["project"], one["name"], one["resume"]) == ("mine", two["name"], "allow")
    assert one["config"]["distill.optimizer.lr"] == 1e-4
    assert trackio.calls[1][0] == "log" and trackio.calls[1][1] == ({"train/loss": 1.5, "train/skipped": 0.0},)


def test_another_config_is_another_run(tmp_path: Path, wandb: Recorder) -> None:
    for tags in (["a"], ["b"]):
        open_trackers(config(tmp_path, wandb={"tags": tags}), tmp_path, print).close(failed=True)
    first, second = wandb.of("init")
    assert first["id"] != second["id"]
    assert wandb.of("finish") == [{"exit_code": 1}] * 2


def test_one_that_fails_to_start_is_reported_and_the_others_go_on(
    tmp_path: Path, wandb: Recorder, trackio: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(wandb, "init", refuse, raising=False)
    said: list[str] = []
    trackers = open_trackers(config(tmp_path, wandb={}, trackio={}), tmp_path, said.append)
    trackers.log("train", 1, {"loss": 1.0})
    trackers.close()
    assert said == ["warning: wandb could not start and is disabled: ConnectionError: no route"]
    assert len(trackio.of("log")) == 1
    assert set(read_json(tmp_path / IDS_FILE)["runs"]) == {"trackio"}


class Failing:
    run_id = "x"

    def __init__(self, failures: int):
        self.left, self.taken = failures, []  # type: ignore[var-annotated]

    def log(self, kind: str, step: int, values: Any) -> None:
        if self.left:
            self.left -= 1
            raise TimeoutError(f"step {step}")
        self.taken.append(step)

    def close(self, failed: bool) -> None:
        raise OSError("gone")


@pytest.mark.parametrize(("failures", "taken"), [(3, [4, 5, 6, 7]), (5, [])])
def test_failures_are_reported_once_and_five_in_a_row_disable_it(failures: int, taken: list[int]) -> None:
    said: list[str] = []
    tracker = Failing(failures)
    trackers = Trackers({"mlflow": tracker}, said.append)
    for step in range(1, 8):
        trackers.log("train", step, {"loss": 1.0})
    trackers.close()
    assert tracker.taken == taken
    expected = ["warning: mlflow did not take train step 1: TimeoutError: step 1"]
    expected += ["warning: mlflow failed 5 times in a row and is disabled"] if failures == 5 else []
    assert said == [*expected, "warning: mlflow could not be finished: OSError: gone"]


def test_training_never_waits_for_a_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker that hangs: rows beyond the queue are dropped, closing gives up, both are reported."""
    monkeypatch.setattr("kdscale.distill.telemetry.trackers._QUEUE_ROWS", 2)
    monkeypatch.setattr("kdscale.distill.telemetry.trackers._CLOSE_SECONDS", 0.05)
    entered, free = threading.Event(), threading.Event()

    class Hanging(Failing):
        def log(self, kind: str, step: int, values: Any) -> None:
            entered.set()
            free.wait(60)

        def close(self, failed: bool) -> None:
            pass

    said: list[str] = []
    trackers = Trackers({"wandb": Hanging(0)}, said.append)
    trackers.log("train", 1, {"loss": 1.0})
    assert entered.wait(60)
    for step in range(2, 6):
        trackers.log("train", step, {"loss": 1.0})
    trackers.close()
    free.set()
    assert said[0].startswith("warning: wandb did not finish in")
    assert said[1].startswith("warning: 3 rows were not sent")  # two of four, and the sign to end


def test_without_trackers_there_is_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    trackers = open_trackers(config(tmp_path), tmp_path, print)
    assert threading.active_count() == before
    trackers.log("train", 1, {"loss": 1.0})
    trackers.close()
    assert not (tmp_path / IDS_FILE).exists()


def test_a_missing_library_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.mlflow"):
        check_trackers(config(tmp_path, mlflow={}).tracking)
    check_trackers(config(tmp_path).tracking)


# --- the real libraries, where they are installed


def test_mlflow_itself(tmp_path: Path) -> None:
    client_of = pytest.importorskip("mlflow.tracking").MlflowClient
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    cfg, said = config(tmp_path, mlflow={"uri": uri, "experiment": "e"}), []
    for step, failed in ((1, True), (2, False)):
        trackers = open_trackers(cfg, tmp_path, said.append)
        trackers.log("train", step, {"loss": float(step)})
        trackers.close(failed)
    assert said == []
    client = client_of(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["distill.optimizer.lr"] == "0.0001"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(1, 1.0), (2, 2.0)]


def test_wandb_itself_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb.sdk")
    cfg, said = config(tmp_path, wandb={"mode": "offline"}), []
    for step in (1, 2):
        trackers = open_trackers(cfg, tmp_path, said.append)
        trackers.log("train", step, {"loss": float(step)})
        trackers.close()
    assert said == []
    run_id = read_json(tmp_path / IDS_FILE)["runs"]["wandb"]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))) >= 1


def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    sqlite = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    cfg, said = config(tmp_path, trackio={"project": "p"}), []
    for step in (1, 2):
        trackers = open_trackers(cfg, tmp_path, said.append)
        trackers.log("train", step, {"loss": float(step)})
        trackers.close()
    assert said == []
    name = read_json(tmp_path / IDS_FILE)["runs"]["trackio"]
    rows = sqlite.get_logs("p", name)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(1, 1.0), (2, 2.0)]
