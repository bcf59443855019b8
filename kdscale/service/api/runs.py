"""Runs: made, listed, looked at, stopped and gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from kdscale.pipeline.progress import stage_progress
from kdscale.pipeline.stage import Stage
from kdscale.pipeline.stages.registry import STAGES
from kdscale.runs.folder import RunFolder
from kdscale.service.access.identity import Actor
from kdscale.service.api.bodies import described, json_body
from kdscale.service.api.dependencies import READ, FoundRun, Reader, Submitter, Words, check_may_change
from kdscale.service.api.schemas import (
    Again,
    ListOf,
    RunDetail,
    RunSummary,
    StageState,
    Submission,
)
from kdscale.service.api.submitting import Taken, take
from kdscale.service.database.runs import Run
from kdscale.service.ids import is_run_id
from kdscale.service.problems import Problem
from kdscale.service.redaction import redacted
from kdscale.service.states import Request as Asked
from kdscale.service.states import RunState

router = APIRouter(prefix="/v1/runs", tags=["runs"])
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$",
        description="Chosen by the client; repeated with the same request, it makes no second run.",
    ),
]  # fmt: skip


@router.post("", status_code=201, openapi_extra=described(Submission))
def submit(
    actor: Submitter,
    request: Request,
    response: Response,
    body: Annotated[Submission, Depends(json_body(Submission))],
    key: Key = None,
) -> RunDetail:
    """Make a run; its address is in Location. It waits in the queue until devices are free."""
    return _answer(response, take(request.app.state, actor, body, key))


@router.get("")
def runs(
    request: Request,
    _: Reader,
    state: Annotated[list[RunState], Query(description="Repeat it for several.")] = [],  # noqa: B006
    owner: Words | None = None,
    search: Annotated[Words, Query(description="Part of a name or an id.")] = "",
    after: Annotated[Words | None, Query(description="The `next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> ListOf[RunSummary]:
    """Runs, the newest first."""
    if after is not None and not is_run_id(after):
        raise Problem(422, "request", "after is no cursor", field="after", expected="the `next` of a page")
    page = request.app.state.runs.page(states=state, owner=owner, search=search, after=after, limit=limit)
    return ListOf[RunSummary](items=[RunSummary.of(run) for run in page.items], next=page.next)


@router.get("/{run_id}", dependencies=[READ])
def one(run: FoundRun) -> RunDetail:
    """All about one run: its stages, its progress, its resolved config."""
    return _detail(run)


@router.post("/{run_id}/pause")
def pause(actor: Submitter, run: FoundRun, request: Request) -> RunSummary:
    """Have a run save, and free its devices; resume goes on from there."""
    return _ask(request, actor, run, "pause")


@router.post("/{run_id}/resume")
def resume(actor: Submitter, run: FoundRun, request: Request) -> RunSummary:
    """Queue a paused, failed or cancelled run again; it goes on from what it saved."""
    return _ask(request, actor, run, "resume")


@router.post("/{run_id}/cancel")
def cancel(actor: Submitter, run: FoundRun, request: Request) -> RunSummary:
    """Stop a run for good; nothing that it made is deleted."""
    return _ask(request, actor, run, "cancel")


@router.post("/{run_id}/rerun", status_code=201, openapi_extra=described(Again))
def rerun(
    actor: Submitter,
    run: FoundRun,
    request: Request,
    response: Response,
    body: Annotated[Again, Depends(json_body(Again))],
    key: Key = None,
) -> RunDetail:
    """Make a new run with the config of this one, from the beginning."""
    return _answer(response, take(request.app.state, actor, body, key, parent=run))


@router.post("/{run_id}/fork", status_code=201, openapi_extra=described(Again))
def fork(
    actor: Submitter,
    run: FoundRun,
    request: Request,
    response: Response,
    body: Annotated[Again, Depends(json_body(Again))],
    key: Key = None,
) -> RunDetail:
    """Make a new run that begins with what this one has finished, up to the first stage that it does otherwise."""
    return _answer(response, take(request.app.state, actor, body, key, parent=run, fork=True))


def _ask(request: Request, actor: Actor, run: Run, what: Asked) -> RunSummary:
    check_may_change(actor, run)
    return RunSummary.of(request.app.state.runs.ask(run.id, what, f"{what} was asked for by {actor.owner}"))


def _answer(response: Response, taken: Taken) -> RunDetail:
    response.headers["Location"] = f"/v1/runs/{taken.run.id}"
    if taken.repeated:
        response.headers["Idempotency-Replayed"] = "true"
    return _detail(taken.run)


def _detail(run: Run) -> RunDetail:
    """All about a run; the stages come from its folder, which is the truth."""
    links = {name: f"/v1/runs/{run.id}/{name}" for name in ("events", "metrics", "logs", "artifacts", "report")}
    return RunDetail.of(
        run, stages=stages_of_run(run), overrides=run.overrides, config=redacted(run.config),
        links={"self": f"/v1/runs/{run.id}", **links},
    )  # fmt: skip


def stages_of_run(run: Run) -> list[StageState]:
    """The stages of a run in their order, those of its steps first, as far as the run folder says that they are."""
    folder = RunFolder(run.folder)
    rows = [stage for stage in STAGES.values() if _has(stage, run.config)]
    found = stage_progress(folder, rows, folder.in_use(), lambda _message: None)
    of_steps = [entry for entry in run.progress.get("stages", []) if entry.get("step")]
    return [_told(entry) for entry in (*of_steps, *map(vars, found))]


def _told(stage: Mapping[str, Any]) -> StageState:
    """What is told of a stage, without secrets."""
    shown = {name: stage[name] for name in ("name", "step", "state", "facts", "reason") if name in stage}
    return StageState(
        title=STAGES[stage["name"]].title, time=stage["since"], seconds=stage["seconds"] or 0.0, **redacted(shown)
    )


def _has(stage: Stage, config: dict[str, Any]) -> bool:
    """Whether a run with this resolved config has the stage; `belongs_to`, without building the config anew."""
    return not (stage.not_with and _given(stage.not_with, config)) and _given(stage.only_with, config)


def _given(dotted: str, config: dict[str, Any]) -> bool:
    """Whether a field of a resolved config is there and not null; "" is."""
    value: Any = config
    for part in dotted.split(".") if dotted else ():
        value = value.get(part) if isinstance(value, dict) else None
    return value is not None
