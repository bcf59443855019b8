"""Every way in which a request can fail, made into `application/problem+json`: none of them shows a traceback."""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from kdscale.errors import KdscaleError
from kdscale.service.problems import Problem, field_of, of_error

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

_LOG = logging.getLogger(__name__)
_NAMES = {
    400: "request", 401: "sign-in", 403: "scope", 404: "not-found", 405: "method", 406: "media-type", 409: "conflict",
    412: "precondition", 413: "too-large", 415: "media-type", 416: "range", 422: "request", 429: "limit",
}  # fmt: skip


def install(app: FastAPI) -> None:
    """Have `app` answer every failure with a problem."""
    handlers: dict[Any, Any] = {
        Problem: lambda _request, problem: problem.response(),
        KdscaleError: lambda _request, error: of_error(error).response(),
        RequestValidationError: _of_parameters,
        HTTPException: _of_framework,
        OperationalError: _of_database,
        Exception: _of_bug,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)


def _of_parameters(_request: Request, error: RequestValidationError) -> Response:
    """Parameters in the path, the query or a header that are not what they must be."""
    fields = [{**field_of(item, skip=1), "in": str(item["loc"][0])} for item in list(error.errors())[:100]]
    return Problem(422, "request", "the request has parameters that cannot be used", errors=fields).response()


def _of_framework(request: Request, error: HTTPException) -> Response:
    """What the framework itself refuses: no such address, another method, a body that cannot be read."""
    detail = str(error.detail)
    if error.status_code == 404 and detail == "Not Found":
        detail = f"there is nothing at {request.url.path[:200]}"
    elif error.status_code == 405:
        detail = f"{request.method} is not answered here"
    name = _NAMES.get(error.status_code, "refused")
    return Problem(error.status_code, name, detail, headers=error.headers).response()


def _of_database(request: Request, error: OperationalError) -> Response:
    """A database that is away, locked for too long or on a full disk: no bug, and it may pass."""
    _LOG.error("%s %s: the database failed: %s", request.method, request.url.path[:500], error.orig)
    hint = "try again; the service's log has more"
    return Problem(
        503, "database", "the database cannot be used now", hint=hint, headers={"Retry-After": "5"}
    ).response()  # fmt: skip


def _of_bug(request: Request, error: Exception) -> Response:
    """A bug of ours: the log has the traceback, the answer has the number to find it by."""
    number = secrets.token_hex(6)
    _LOG.error("request %s: %s %s failed", number, request.method, request.url.path, exc_info=error)
    detail = f"the service failed; its log has more under {number}"
    return Problem(500, "service", detail, hint="tell whoever runs this service", incident=number).response()
