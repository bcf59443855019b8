"""What can be done with a run from the page: each is a button, a question and a form that answers it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.responses import RedirectResponse, Response

from kdscale.errors import KdscaleError
from kdscale.service.access.identity import Actor, require
from kdscale.service.api.dependencies import FoundRun, Submitter, check_may_change
from kdscale.service.api.schemas import Again
from kdscale.service.api.submitting import take
from kdscale.service.database.runs import Run
from kdscale.service.page.rendering import PageRoute, as_problem, render, told
from kdscale.service.page.signing_in import Form, text_of
from kdscale.service.problems import Problem, fields_of
from kdscale.service.states import ANSWERS
from kdscale.service.states import Request as Asked

router = APIRouter(include_in_schema=False, route_class=PageRoute)
Name = Literal["pause", "resume", "cancel", "rerun", "fork"]


@dataclass(frozen=True)
class Action:
    """A button. `asked` is what it asks of the run itself; without that it makes a new run."""

    name: Name
    label: str
    what: str  # happens: said before it does
    asked: Asked | None = None


ACTIONS: Mapping[Name, Action] = {
    action.name: action
    for action in (
        Action("pause", "Pause", "The run saves and frees its devices. Resume goes on from there.", "pause"),
        Action("resume", "Resume", "The run goes back into the queue and goes on from what it saved.", "resume"),
        Action("cancel", "Cancel", "The run stops. Nothing that it made is deleted, and it can be resumed.", "cancel"),
        Action("rerun", "Run again", "A new run begins with the same config, from the beginning."),
        Action("fork", "Fork", "A new run begins with what this one has finished, up to what you change."),
    )
}


def actions_for(run: Run, actor: Actor) -> list[Action]:
    """The buttons that fit a run's state and what its reader may do."""
    own = run.origin == "service" and actor.may_change(run.owner)
    return [
        action
        for action in ACTIONS.values()
        if (own and run.state in ANSWERS[action.asked] if action.asked else actor.may("run"))
    ]


@router.get("/runs/{run_id}/{name}")
def question(request: Request, run: FoundRun, name: Name, _: Submitter) -> Response:
    """Ask whether it is meant."""
    return _question(request, run, ACTIONS[name], {"name": run.name, "overrides": ""})


@router.post("/runs/{run_id}/{name}")
def answer(
    request: Request, run: FoundRun, name: Name, form: Form, actor: Annotated[Actor, Depends(require("run"))]
) -> Response:
    """Do it, and show the run; the question again, with what is wrong, where it cannot be done."""
    action = ACTIONS[name]
    sent = {"name": text_of(form, "name").strip(), "overrides": text_of(form, "overrides")}
    try:
        if action.asked:
            check_may_change(actor, run)
            request.app.state.runs.ask(run.id, action.asked, f"{action.asked} was asked for by {actor.owner}")
            there = run.id
        else:
            body = again(sent) if name == "fork" else Again()
            key, fork = text_of(form, "key", 200) or None, name == "fork"
            there = take(request.app.state, actor, body, key, parent=run, fork=fork).run.id
    except (Problem, KdscaleError) as error:
        return _question(request, run, action, sent, as_problem(error))
    return RedirectResponse(f"/runs/{there}", 303)


def again(sent: Mapping[str, str]) -> Again:
    """What the form of a fork says. Raises a Problem for what cannot be used."""
    try:
        return Again.model_validate({"set": settings_of(sent["overrides"]), "name": sent["name"] or None})
    except ValidationError as error:
        raise Problem(422, "request", "the form cannot be used", errors=fields_of(error)) from error


def settings_of(text: str) -> list[str]:
    """Settings from a text with one a line; empty lines and lines that begin with # are no settings."""
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def _question(
    request: Request, run: Run, action: Action, form: Mapping[str, str], problem: Problem | None = None
) -> Response:
    return render(
        request, "confirm.html.j2", f"{action.label}: {run.name}", status=problem.status if problem else 200, run=run,
        action=action, form=form, key=secrets.token_urlsafe(16), problem=told(problem) if problem else None,
    )  # fmt: skip
