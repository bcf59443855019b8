"""What can be submitted, checked and compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from kdscale.config.load import shipped_configs
from kdscale.service.api.checking import hardware, validating
from kdscale.service.api.checking.estimate import estimate
from kdscale.service.database.runs import Run
from kdscale.service.settings import LimitSettings, ServiceSettings
from tests.unit.service.api.conftest import Caller, metrics_log


@pytest.fixture
def teacher(settings: ServiceSettings, tiny_llama_dir: Path) -> Path:
    """A model below the folders that configs may name."""
    place = Path(settings.roots[0]) / "small" / "llama"
    shutil.copytree(tiny_llama_dir, place)
    (place.parent / "broken").mkdir()
    for name in ("config.json", "model.safetensors"):
        (place.parent / "broken" / name).write_text("{}")
    (place.parent / ".hidden").mkdir()
    shutil.copy(place / "config.json", place.parent / ".hidden")
    return place


def test_teachers_are_found_below_the_roots(as_: Caller, teacher: Path) -> None:
    found = {entry["name"]: entry for entry in as_("reader").get("/v1/teachers").json()["items"]}
    assert found["llama"]["path"] == str(teacher) and found["llama"]["model_type"] == "llama"
    assert found["llama"]["parameters"] > 1000 and found["broken"]["note"]
    assert found["smollm2-135m-instruct"]["path"] is None and "get-teacher" in found["smollm2-135m-instruct"]["note"]
    assert set(found) == {"llama", "broken", "smollm2-135m-instruct"}


def test_configs_are_those_that_ship_and_your_own(as_: Caller, make_run: Callable[..., Run]) -> None:
    run, _ = make_run(1), make_run(2, owner="bob")
    found = as_("ada").get("/v1/configs").json()["items"]
    assert [entry["name"] for entry in found] == [*shipped_configs(), run.id]
    for name in (found[0]["name"], run.id):
        shown = as_("ada").get(f"/v1/configs/{name}").json()
        assert shown["text"] and shown["config"]["prune"]
    for name in ("nothing", "..%2fdemo", "demo.yaml"):
        assert as_("ada").get(f"/v1/configs/{name}").status_code == 404


def test_the_machine_and_what_runs_hold_of_it(as_: Caller, make_run: Callable[..., Run], app: FastAPI) -> None:
    run = make_run(1)
    app.state.runs.move(run.id, "starting", devices=["GPU-1"])
    make_run(2)
    found = as_("reader").get("/v1/machine").json()
    assert (found["slots_held"], found["held"], found["counts"]) == (1, {"GPU-1": run.id}, {"queued": 1, "starting": 1})
    assert found["slots"] >= 1 and found["memory_bytes"] > found["memory_free_bytes"] > 0


def test_gpus_are_read_from_what_the_driver_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "GPU-a, NVIDIA H200, 143771, 1024, 37\nGPU-b, NVIDIA H200, 143771, [N/A], [N/A]\n\nnonsense\n"
    first, second = hardware.parse_gpus(listed)
    assert (first["memory_bytes"], first["used_bytes"], first["busy"]) == (143771 << 20, 1 << 30, 0.37)
    assert (second["used_bytes"], second["busy"]) == (None, None)
    known = {
        ("NVIDIA H100 80GB HBM3", 81559): "h100", ("NVIDIA A100-SXM4-80GB", 81920): "a100-80",
        ("NVIDIA A100-PCIE-40GB", 40960): "a100-40", ("Tesla T4", 15360): None,
    }  # fmt: skip
    for (name, memory), expected in known.items():
        one = {"name": name, "memory_bytes": memory << 20}
        monkeypatch.setattr(hardware, "gpus", lambda one=one: [one] * 4)
        assert hardware.gpus_of() == (expected and (expected, 4))


def test_runs_are_compared_without_the_service_s_paths(as_: Caller, make_run: Callable[..., Run], app: FastAPI) -> None:
    first, second = (make_run(n, {"logs/metrics.jsonl": metrics_log(n, loss=float)}) for n in (1, 2))
    found = as_("reader").get("/v1/compare", params={"runs": f"{first.id},{second.id}"})
    assert [run["id"] for run in found.json()["runs"]] == [first.id, second.id]
    assert [run["steps"] for run in found.json()["runs"]] == [1, 2]
    assert f"{app.state.settings.runs}/{first.id}" not in str(found.json()["runs"])
    many = ",".join(map(str, range(30)))
    for query, status in (("nothing", 404), (",".join([first.id] * 3), 200), ("", 422), (many, 422)):
        assert as_("reader").get("/v1/compare", params={"runs": query}).status_code == status, query
    shutil.rmtree(second.folder)
    assert as_("reader").get("/v1/compare", params={"runs": second.id}).status_code == 409


CHECKED = {"prune": {"target_params": "60%"}, "distill": {"tokens": "1M"}, "runtime": {"device": "cpu"}}


def test_a_config_is_checked_and_nothing_is_made(as_: Caller, app: FastAPI, teacher: Path) -> None:
    body = {
        "config": {**CHECKED, "teacher": {"path": str(teacher)}, "data": {"sources": [{"path": "builtin:classics"}]}},
        "gpu": "a100-80",
    }
    verdict = as_("reader").post("/v1/runs:validate", json=body).json()
    assert verdict["valid"] and verdict["refused"] == []
    assert verdict["teacher_parameters"] > verdict["student_parameters"] > 0
    assert verdict["student"]["layers"] >= 1 and verdict["stages"][0] == "data"
    estimate = verdict["estimate"]
    assert (estimate["cluster"]["nodes"], estimate["assumed"], estimate["tokens"]) == (1, False, 1_000_000)
    assert estimate["tokens_per_second"] > 0 and estimate["days"] > 0 and estimate["gpu_bytes"] > 0
    assert not list(app.state.settings.runs.iterdir()) and not app.state.runs.page().items


def test_all_that_is_wrong_is_told_at_once(as_: Caller, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def here(question: dict[str, Any], _seconds: float) -> dict[str, Any]:
        return estimate(question)  # without another process, which has to load everything anew

    monkeypatch.setattr(validating, "_in_child", here)
    config = {**CHECKED, "teacher": {"path": str(teacher)}, "data": {"sources": [{"path": str(teacher / "none.txt")}]}}
    verdict = as_("reader").post("/v1/runs:validate", json={"config": config, "set": ["prune.target_params=3%"]}).json()
    assert not verdict["valid"] and verdict["estimate"] is None
    assert "prune.target_params" in {entry["field"] for entry in verdict["refused"]}, verdict["refused"]
    assert any("none.txt" in entry["detail"] + entry["got"] for entry in verdict["refused"]), verdict["refused"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"config": {"prune": 3}}, "prune"), ({"config": {}, "set": ["a"]}, "a"),
        ({"config_name": "quick", "set": ["teacher.trust_remote_code=true"]}, "teacher.trust_remote_code"),
    ],
)  # fmt: skip
def test_what_no_run_can_say_needs_no_process(
    as_: Caller, body: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validating, "_in_child", None)
    verdict = as_("reader").post("/v1/runs:validate", json=body).json()
    assert not verdict["valid"] and field in {entry["field"] for entry in verdict["refused"]}


def test_a_check_has_a_time_limit(as_: Caller, app: FastAPI, teacher: Path) -> None:
    limits = LimitSettings(check_seconds=0.05)
    app.state.settings = app.state.settings.model_copy(update={"limits": limits})
    answer = as_("reader").post("/v1/runs:validate", json={"config": {**CHECKED, "teacher": {"path": str(teacher)}}})
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:kdscale:problem:slow")
    assert app.state.waiting_checks == 0
    app.state.waiting_checks = 8
    again = as_("reader").post("/v1/runs:validate", json={"config": {**CHECKED, "teacher": {"path": str(teacher)}}})
    assert (again.status_code, again.headers["retry-after"]) == (429, "5")
    unknown = as_("reader").post("/v1/runs:validate", json={"config_name": "quick", "gpu": "abacus"})
    assert unknown.json()["field"] == "gpu"
