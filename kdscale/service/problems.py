"""What went wrong, as every part of the service tells it: `application/problem+json` (RFC 9457).

A problem has the parts of an error of kdscale: what is wrong (`detail`), what was expected, what came, what to do
(`hint`). It never has a traceback, nor a user, password or token that stood in an address.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from kdscale import errors
from kdscale.config.fields import explain_error, shown
from kdscale.escaping import for_terminal
from kdscale.service.database.answers import KeyReusedError
from kdscale.service.redaction import redacted_text
from kdscale.service.request_ids import request_id
from kdscale.service.states import UnknownRunError, WrongTransitionError

MEDIA_TYPE = "application/problem+json"
_TYPE = "urn:kdscale:problem:{}"
_MOST_FIELDS = 100  # in one answer

# The status and the name of each error of ours; an error that is not listed counts as its base class does.
STATUSES: Mapping[type[errors.KdscaleError], tuple[int, str]] = {
    errors.KdscaleError: (422, "refused"),
    errors.ConfigError: (422, "config"),
    errors.CheckpointError: (422, "checkpoint"),
    errors.DataError: (422, "data"),
    errors.RunFolderError: (409, "run-folder"),
    errors.FileError: (409, "file"),
    UnknownRunError: (404, "not-found"),
    WrongTransitionError: (409, "state"),
    KeyReusedError: (422, "key"),
    errors.ServiceError: (502, "other-service"),
    errors.MachineError: (503, "machine"),
    errors.LackOfMemoryError: (503, "memory"),
    errors.MissingProgramError: (503, "missing-program"),
}


class Problem(Exception):  # noqa: N818 - a problem is what the answer holds
    """An answer that says what is wrong; raised anywhere in a request, it becomes the response.

    `name` is the last word of its type, `extra` holds further members: field, expected, got, hint, errors.
    """

    def __init__(self, status: int, name: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any):
        super().__init__(detail)
        self.status, self.name, self.detail = status, name, clean(detail)
        self.headers = dict(headers or {})
        self.extra = {key: value for key, value in extra.items() if value not in (None, "", [])}

    @property
    def content(self) -> dict[str, Any]:
        """The members of the JSON object."""
        return {
            "type": _TYPE.format(self.name), "title": HTTPStatus(self.status).phrase, "status": self.status,
            "detail": self.detail, **self.extra, **({"request_id": asked} if (asked := request_id()) else {}),
        }  # fmt: skip

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.content, self.status, self.headers, MEDIA_TYPE)


def of_error(error: errors.KdscaleError, model: type[BaseModel] | None = None) -> Problem:
    """The problem that an error of ours is; `model`: whose fields it is about, where pydantic found it."""
    status, name = next(STATUSES[base] for base in type(error).__mro__ if base in STATUSES)
    if isinstance(cause := error.__cause__, ValidationError):
        return Problem(status, name, error.what.splitlines()[0].rstrip(":"), errors=fields_of(cause, model=model))
    parts: dict[str, Any] = {key: clean(value) for key, value in error.parts.items() if key != "what"}
    return Problem(status, name, error.what, field=field_of_error(error), **parts)


def fields_of(error: ValidationError, *, skip: int = 0, model: type[BaseModel] | None = None) -> list[dict[str, str]]:
    """One entry for each field that pydantic refused: `field`, `detail` and what came."""
    items = error.errors(include_url=False, include_context=False)[:_MOST_FIELDS]
    return [field_of(item, skip=skip, model=model) for item in items]


def field_of(item: Any, *, skip: int = 0, model: type[BaseModel] | None = None) -> dict[str, str]:
    """The entry for one of pydantic's errors; `skip`: leading parts of its place that are no field."""
    field = ".".join(str(part)[:80] for part in item["loc"][skip:])
    if model is not None:
        return {"field": clean(field), "detail": clean(explain_error(item, model).removeprefix(f"{field}: "))}
    detail = str(item["msg"]).removeprefix("Value error, ")[:2000]
    entry = {"field": clean(field), "detail": clean(detail[:1].lower() + detail[1:])}
    if item["type"] not in ("missing", "extra_forbidden") and not isinstance(item.get("input"), dict):
        entry["got"] = clean(shown(item.get("input")))
    return entry


def clean(text: str) -> str:
    """A text without what steers terminals, and without the secrets of addresses."""
    return for_terminal(redacted_text(text))


def field_of_error(error: errors.KdscaleError) -> str:
    """The dotted field that an error is about; empty where it names something else."""
    what = error.what.removeprefix("--set ")
    return what if what.isascii() and what.replace(".", "").replace("_", "").isalnum() else ""
