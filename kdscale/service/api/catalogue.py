"""What there is to submit and to compare: teachers, configs, this machine, and runs side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from kdscale.config.load import load_config, shipped_configs
from kdscale.errors import KdscaleError
from kdscale.families import load_family
from kdscale.files import read_text
from kdscale.packaging.catalog import NAMES
from kdscale.report.compare.runs import gather
from kdscale.service.api.checking.hardware import machine_facts
from kdscale.service.api.dependencies import READ, Reader
from kdscale.service.api.schemas import ConfigEntry, ConfigText, ListOf, MachineFacts, TeacherEntry
from kdscale.service.api.submitting import machine_of
from kdscale.service.database.runs import Runs
from kdscale.service.ids import is_run_id
from kdscale.service.problems import Problem
from kdscale.service.redaction import redacted
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import ACTIVE, UnknownRunError
from kdscale.weights import read_config

router = APIRouter(prefix="/v1", tags=["catalogue"], dependencies=[READ])
_MOST_FOLDERS, _DEPTH, _KEPT_SECONDS = 2000, 3, 60.0  # of a search below the roots
_RECENT, _MOST_COMPARED = 50, 20


@router.get("/teachers")
def teachers(request: Request) -> ListOf[TeacherEntry]:
    """Models below the folders that configs may name, and those that `kdscale get-teacher` can fetch."""
    state = request.app.state
    kept: tuple[float, list[TeacherEntry]] | None = getattr(state, "teachers", None)
    if kept is None or time.monotonic() - kept[0] > _KEPT_SECONDS:
        kept = state.teachers = time.monotonic(), _teachers(state.settings)
    return ListOf(items=kept[1])


def _teachers(settings: ServiceSettings) -> list[TeacherEntry]:
    found = [_teacher(folder) for root in settings.roots for folder in _model_folders(Path(root))]
    here = {entry.name for entry in found}
    catalog = [
        TeacherEntry(
            name=name, path=None, kind="catalog", note=f"{entry.origin}: kdscale get-teacher {name} FOLDER fetches it"
        )
        for name, entry in NAMES.items()
        if name not in here
    ]
    return [*found, *catalog]


def _model_folders(root: Path) -> Iterator[Path]:
    left = _MOST_FOLDERS
    for here, folders, names in os.walk(root):
        left -= 1
        if "config.json" in names and any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
            yield Path(here)
            folders.clear()
        if left <= 0 or len(Path(here).relative_to(root).parts) >= _DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _teacher(folder: Path) -> TeacherEntry:
    try:
        config = read_config(folder)
        family = load_family(config, str(folder))
        parameters = family.count_params(config).total
    except KdscaleError as error:
        return TeacherEntry(name=folder.name, path=str(folder), kind="folder", note=error.what)
    return TeacherEntry(
        name=folder.name, path=str(folder), kind="folder", model_type=str(config.get("model_type", "")),
        parameters=parameters,
    )  # fmt: skip


@router.get("/configs")
def configs(request: Request, actor: Reader) -> ListOf[ConfigEntry]:
    """Configs that come with kdscale, and those of your own latest runs."""
    shipped = [ConfigEntry(name=name, kind="shipped", title=_title(path)) for name, path in shipped_configs().items()]
    page = request.app.state.runs.page(owner=actor.owner, limit=_RECENT)
    return ListOf(items=[*shipped, *(ConfigEntry(name=run.id, kind="run", title=run.name) for run in page.items)])


@router.get("/configs/{name}")
def config(name: str, request: Request) -> ConfigText:
    """One config: its text, and the whole of it with every default."""
    if is_run_id(name):
        run = request.app.state.runs.get(name)
        path = run.folder / "config.yaml"
        text = read_text(path) if path.is_file() else ""
        return ConfigText(name=name, kind="run", title=run.name, text=text, config=redacted(run.config))
    path = shipped_configs().get(name)
    if path is None:
        raise Problem(404, "not-found", f"there is no config {name[:100]!r}", expected=", ".join(shipped_configs()))
    resolved = load_config(path).resolved()
    return ConfigText(name=name, kind="shipped", title=_title(path), text=read_text(path), config=resolved)


def _title(path: Path) -> str:
    """The first line of a config that ships: a comment that says what it is for."""
    first = read_text(path).partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else path.stem


@router.get("/machine")
def machine(request: Request) -> MachineFacts:
    """The devices of the service's machine, which of them runs hold, the queue, and the disk."""
    state = request.app.state
    runs: Runs = state.runs
    slots = machine_of(state).slots
    active = runs.in_states(ACTIVE)
    held = {device: run.id for run in active for device in run.devices}
    local = [run for run in active if run.target.get("engine", "local") == "local"]
    return MachineFacts(
        slots=slots, slots_held=sum(run.slots for run in local), held=held, counts=runs.counts(),
        engines=sorted(state.engines) or ["local"], **machine_facts(state.settings),
    )  # fmt: skip


@router.get("/compare")
def compare(
    request: Request,
    runs: Annotated[str, Query(min_length=1, max_length=1000, description="Ids of runs, comma-separated.")],
) -> dict[str, Any]:
    """Runs side by side: the figures of their models, what was measured otherwise, how their configs differ."""
    ids = list(dict.fromkeys(part.strip() for part in runs.split(",")))
    if len(ids) > _MOST_COMPARED:
        raise Problem(422, "request", "too many runs", field="runs", expected=f"at most {_MOST_COMPARED}")
    if strange := [run_id for run_id in ids if not is_run_id(run_id)]:
        raise UnknownRunError(f"there is no run {strange[0][:60]!r}")
    found = [request.app.state.runs.get(run_id) for run_id in ids]
    if missing := [run.id for run in found if not run.folder.is_dir()]:
        raise Problem(409, "run-folder", f"the folder of run {missing[0]} is gone")
    facts = gather([run.folder for run in found])
    for entry, run in zip(facts["runs"], found, strict=True):
        entry["id"] = run.id
        del entry["folder"]
    answer: dict[str, Any] = redacted(facts)
    return answer
