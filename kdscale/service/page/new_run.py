"""The form of a new run: checked while it is filled in, and the command line that does the same."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.responses import RedirectResponse, Response

from kdscale.config.load import parse_yaml, shipped_configs
from kdscale.errors import ConfigError, KdscaleError
from kdscale.service.access.identity import Actor, require
from kdscale.service.api.checking.validating import validate
from kdscale.service.api.dependencies import Submitter
from kdscale.service.api.schemas import Question, Submission, Verdict
from kdscale.service.api.submitting import take
from kdscale.service.engines.engine import ENGINES
from kdscale.service.page.actions import settings_of
from kdscale.service.page.facts.config_changes import command_line
from kdscale.service.page.rendering import PageRoute, as_problem, render, told
from kdscale.service.page.signing_in import Form, text_of
from kdscale.service.problems import Problem, fields_of
from kdscale.units import compact_duration, format_count, format_size

router = APIRouter(include_in_schema=False, route_class=PageRoute)
Sender = Annotated[Actor, Depends(require("run"))]
Asked = TypeVar("Asked", bound=Submission)
_MOST_CHARACTERS = 64 << 10
_FIELDS = ("config_name", "config", "overrides", "name", "priority", "engine")
_EMPTY = {**dict.fromkeys(_FIELDS, ""), "priority": "0", "engine": "local"}


@router.get("/runs/new")
def new_run(request: Request, _: Submitter, config: str = "") -> Response:
    """The empty form, or one with a config chosen."""
    return _page(request, {**_EMPTY, "config_name": config if config in shipped_configs() else ""})


@router.post("/runs/new")
def submit(request: Request, form: Form, actor: Sender) -> Response:
    """Make the run, and show it; the form again, with what is wrong, where it cannot be made."""
    sent = _sent(form)
    try:
        taken = take(request.app.state, actor, submission(sent), text_of(form, "key", 200) or None)
    except (Problem, KdscaleError) as error:
        return _page(request, sent, as_problem(error))
    return RedirectResponse(f"/runs/{taken.run.id}", 303)


@router.post("/runs/new/check")
async def check(request: Request, form: Form, actor: Sender) -> Response:
    """The form again, with what the run would be: for browsers without scripts."""
    sent = _sent(form)
    return _page(request, sent, checked=await _checked(request, actor, sent))


@router.post("/runs/new/estimate")
async def estimate(request: Request, form: Form, actor: Sender) -> Response:
    """What the run would be."""
    return render(request, "estimate.html.j2", "New run", **await _checked(request, actor, _sent(form)))


def _sent(form: Any) -> dict[str, str]:
    return {name: text_of(form, name) for name in _FIELDS}


def submission(sent: Mapping[str, str]) -> Submission:
    """What the form asks for. Raises a Problem or a ConfigError for what can be no submission."""
    return _made(Submission, sent)


def question(sent: Mapping[str, str]) -> Question:
    """The same, to be checked."""
    return _made(Question, sent)


def _made(model: type[Asked], sent: Mapping[str, str]) -> Asked:
    try:
        priority = int(sent["priority"].strip() or 0)
    except ValueError as error:
        raise Problem(422, "request", "the priority is no whole number", field="priority") from error
    body: dict[str, Any] = {
        "set": settings_of(sent["overrides"]), "name": sent["name"].strip() or None, "priority": priority,
        "target": {"engine": sent["engine"] or "local"},
    }  # fmt: skip
    if sent["config_name"]:
        body["config_name"] = sent["config_name"]
    else:
        if len(sent["config"]) > _MOST_CHARACTERS:  # far more than any config has; reading YAML is slow
            raise ConfigError("the YAML is too large", expected=f"at most {_MOST_CHARACTERS:,} characters")
        tree = parse_yaml(sent["config"], "the YAML")
        if not isinstance(tree, dict):
            raise ConfigError("no config", expected="one that is chosen, or YAML with settings")
        body["config"] = tree
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise Problem(422, "request", "the form cannot be used", errors=fields_of(error)) from error


def _page(
    request: Request, form: Mapping[str, str], problem: Problem | None = None, checked: dict[str, Any] | None = None
) -> Response:
    nothing: dict[str, Any] = {"refused": [], "notes": [], "estimate": [], "commands": []}
    return render(
        request, "new.html.j2", "New run", here="/runs/new", status=problem.status if problem else 200, form=form,
        configs=sorted(shipped_configs()), engines=list(ENGINES), key=secrets.token_urlsafe(16),
        roots=request.app.state.settings.roots[:5], problem=told(problem) if problem else None, **(checked or nothing),
    )  # fmt: skip


async def _checked(request: Request, actor: Actor, sent: Mapping[str, str]) -> dict[str, Any]:
    """What the templates show of a check: what was refused, or what the run would be; and the commands."""
    if not sent["config_name"] and not sent["config"].strip():
        return {"refused": [], "notes": [], "estimate": [], "commands": []}
    try:
        verdict = await validate(actor, request, question(sent))
    except (Problem, KdscaleError) as error:
        shown = told(as_problem(error))
        return {"refused": [shown["detail"], *shown["parts"]], "notes": [], "estimate": [], "commands": []}
    refused = [": ".join(filter(None, (each.field, each.detail, each.hint))) for each in verdict.refused]
    return {
        "refused": refused, "notes": verdict.notes, "estimate": facts_of(verdict),
        "commands": [] if refused else _commands(request, sent),
    }  # fmt: skip


def facts_of(verdict: Verdict) -> list[tuple[str, str]]:
    """Titles and values of what a check has found."""
    found = []
    if verdict.teacher_parameters:
        found.append(("Teacher", f"{format_count(verdict.teacher_parameters)} parameters"))
    if verdict.student_parameters:
        found.append(("Student", f"{format_count(verdict.student_parameters)} parameters"))
    if verdict.student:
        found.append(("Its shape", ", ".join(f"{name} {size:,}" for name, size in verdict.student.items())))
    if verdict.stages:
        found.append(("Stages", ", ".join(verdict.stages)))
    if guess := verdict.estimate:
        cluster, speed = guess.cluster, format_count(guess.tokens_per_second)
        devices = f"{cluster.get('nodes', 1) * cluster.get('gpus_per_node', 1)} × {cluster.get('gpu')}"
        found.append(("On", f"{devices}, as no GPU of this machine is known" if guess.assumed else devices))
        found.append(("Memory", f"{format_size(guess.gpu_bytes)} a device{'' if guess.fits else ': does not fit'}"))
        found.append(("Training", f"{format_count(guess.tokens)} tokens at {speed} a second"))
        seconds = 86_400 * guess.days
        found.append(("Time", compact_duration(seconds) if seconds >= 60 else "less than a minute"))
    return found


def _commands(request: Request, sent: Mapping[str, str]) -> list[dict[str, str]]:
    settings, name = settings_of(sent["overrides"]), sent["name"].strip()
    options = [("--server", str(request.base_url).rstrip("/")), *([("--name", name)] if name else [])]
    return [
        {"what": "To this service:", "text": command_line("submit", sent["config_name"], settings, *options)},
        {"what": "Without a service:", "text": command_line("run", sent["config_name"], settings)},
    ]
