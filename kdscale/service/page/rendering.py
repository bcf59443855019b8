"""Templates of the page, and how a request that fails is answered with a page instead of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

import kdscale
from kdscale import units
from kdscale.errors import KdscaleError
from kdscale.escaping import for_terminal
from kdscale.report.compare.page import shape_text
from kdscale.service.access.identity import Actor
from kdscale.service.access.sessions import csrf_token
from kdscale.service.page import static_files
from kdscale.service.problems import Problem, of_error

_FOLDER = Path(__file__).parent
_LONGEST = 200  # characters of a config's value
SIGN_IN, _HTMX = "/sign-in", "hx-request"


def render(
    request: Request, template: str, title: str, *, status: int = 200, here: str = "", **values: Any
) -> HTMLResponse:
    """A page, or a part of one. `here` is the address that the navigation marks."""
    actor = getattr(request.state, "actor", None)
    text = _environment().get_template(template).render(
        title=title, here=here, actor=actor, csrf=csrf_token(request) if actor else "", version=kdscale.__version__,
        static=static_files.DIGEST, now=time.time(), **values,
    )  # fmt: skip
    return HTMLResponse(text, status)


def signed_in(request: Request) -> Actor:
    """Who looks at the page."""
    found: Actor = request.state.actor
    return found


def as_problem(error: Exception) -> Problem:
    """The problem that an error is; raises the error again where it is a bug."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, KdscaleError):
        return of_error(error)
    if isinstance(error, HTTPException):
        return Problem(error.status_code, "refused", str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return Problem(422, "request", "; ".join(str(part["msg"]) for part in error.errors()))
    raise error


def told(problem: Problem) -> dict[str, Any]:
    """A problem as the templates show it: title, detail, its parts, what to do."""
    titles = {401: "Not signed in", 403: "Not allowed", 404: "Not found", 409: "This does not fit"}
    parts = [_part(entry) for entry in problem.extra.get("errors", [])]
    parts += [f"{word} {problem.extra[word]}" for word in ("expected", "got") if word in problem.extra]
    return {
        "title": titles.get(problem.status, "This cannot be done"), "detail": problem.detail, "parts": parts,
        "hint": problem.extra.get("hint", ""),
    }  # fmt: skip


def _part(entry: Mapping[str, Any]) -> str:
    """One wrong field: `distill.lr: a number above 0, got -1`."""
    said = ", ".join(
        f"{word} {entry[key]}" if word else str(entry[key])
        for key, word in (("detail", ""), ("expected", "expected"), ("got", "got"), ("hint", ""))
        if entry.get(key)
    )
    return f"{entry['field']}: {said}" if entry.get("field") else said


class PageRoute(APIRoute):
    """A route whose failures are pages; whoever is not signed in is asked to."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler around the one of the framework."""
        answer = super().get_route_handler()

        async def answer_with_pages(request: Request) -> Response:
            try:
                return await answer(request)
            except (Problem, KdscaleError, HTTPException, RequestValidationError) as error:
                problem = as_problem(error)
            if problem.status == HTTPStatus.UNAUTHORIZED:
                return _to_sign_in(request)
            # in the place of a part of a page there is room for a part
            template = "problem_part.html.j2" if _HTMX in request.headers else "problem.html.j2"
            page = render(
                request, template, told(problem)["title"], status=problem.status, problem=told(problem),
                back="/runs",
            )  # fmt: skip
            page.headers.update(problem.headers)
            return page

        return answer_with_pages


def install(app: FastAPI) -> None:
    """Have whoever opens an address in a browser at which there is nothing get a page, too."""
    of_framework = app.exception_handlers[HTTPException]

    def answer(request: Request, error: Exception) -> Any:
        nothing = isinstance(error, HTTPException) and error.status_code == HTTPStatus.NOT_FOUND
        if not (nothing and request.method == "GET" and "text/html" in request.headers.get("accept", "")):
            return of_framework(request, error)
        problem = Problem(404, "not-found", f"There is nothing at {request.url.path[:200]}")
        return render(request, "problem.html.j2", "Not found", status=404, problem=told(problem), back="/runs")

    app.add_exception_handler(HTTPException, answer)


def _to_sign_in(request: Request) -> Response:
    if _HTMX in request.headers:  # a part of a page: the whole page goes there
        return Response(status_code=204, headers={"HX-Redirect": SIGN_IN})
    path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    there = f"?next={quote(path, safe='')}" if request.method == "GET" and path != "/" else ""
    return RedirectResponse(SIGN_IN + there, 303)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_visible, auto_reload=False,
    )  # fmt: skip
    environment.filters |= {
        "ago": ago, "brief": units.compact_duration, "clock": _clock, "count": units.format_count,
        "iso": iso, "moment": _moment, "shape": shape_text,
        "size": units.format_size, "value": in_short,
    }  # fmt: skip
    return environment


def _visible(value: Any) -> Any:
    """Text of others without characters that hide something or turn its order around; HTML is escaped after this."""
    return for_terminal(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def in_short(value: Any) -> str:
    """A config's value in a table."""
    text = "–" if value is None else f"{value:,}" if type(value) is int else str(value)
    if isinstance(value, bool | list | dict):
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def iso(seconds: float) -> str:
    """A time as `2026-11-30T22:15:04Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M UTC")


def ago(seconds: float) -> str:
    """`just now`, `12 min ago`."""
    return "just now" if seconds < 10 else f"{units.compact_duration(seconds)} ago"
