"""What a service refuses, as errors in words: one class for each thing that a caller may want to tell apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdscale.errors import ServiceError

_LONGEST_WORDS = 2000


class RefusedError(ServiceError):
    """An answer with an error status. `status` is HTTP's, `problem` the members of the answer (RFC 9457)."""

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
        status: int = 0,
        problem: Mapping[str, Any] | None = None,
    ):
        super().__init__(what, expected=expected, got=got, hint=hint)
        self.status, self.problem = status, dict(problem or {})


class TokenError(RefusedError):
    """401: no token, or one that the service does not know, or no longer."""


class ScopeError(RefusedError):
    """403: the token does not allow this."""


class UnknownError(RefusedError):
    """404: there is no such run, artifact or page."""


class StateError(RefusedError):
    """409: what was asked does not fit the state that the run is in."""


class ChangedError(RefusedError):
    """412: the file is another one than the one that was asked for."""


class SpecError(RefusedError):
    """400, 413 or 422: the service cannot use what was sent."""


class BusyError(RefusedError):
    """A limit was reached, or the service is starting or stopping. `retry_after`: seconds that it asks to wait."""

    retry_after: float | None = None


class UnreachableError(ServiceError):
    """The connection failed. `not_received`: before anything was sent; `for_good`: trying again changes nothing."""

    not_received = for_good = False


_BY_STATUS: dict[int, type[RefusedError]] = {
    400: SpecError, 401: TokenError, 403: ScopeError, 404: UnknownError, 409: StateError, 412: ChangedError,
    413: SpecError, 422: SpecError, 429: BusyError, 502: BusyError, 503: BusyError, 504: BusyError,
}  # fmt: skip
_HINTS = {
    401: "kdscale login --server URL keeps a valid token, or set KDSCALE_TOKEN",
    403: "ask for a token with the scope that this needs",
}


def refusal(status: int, body: bytes, url: str, token: str | None) -> RefusedError:
    """The error of an answer with this status; it never shows the token, also where the server repeats it."""
    problem = _problem(body)
    parts = {name: _text(problem.get(name), token) for name in ("title", "detail", "expected", "got", "hint")}
    # the service's own errors come as their parts; whatever else answers at this address has a text
    what = parts["detail"] or parts["title"] or _text(body.decode("utf-8", "replace"), token)
    errors = [_one_field(item, token) for item in _list(problem.get("errors"))]
    lines = [what or f"status {status}", *(f"  - {error}" for error in errors if error)]
    return _BY_STATUS.get(status, RefusedError)(
        "\n".join(lines), expected=parts["expected"],
        got=parts["got"] or (None if isinstance(problem.get("detail"), str) else f"status {status} from {url}"),
        hint=parts["hint"] or _HINTS.get(status), status=status, problem=problem,
    )  # fmt: skip


def _problem(body: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any, token: str | None) -> str:
    text = value if isinstance(value, str) else "" if value is None else str(value)
    text = text.replace(token, "***") if token else text
    return text[:_LONGEST_WORDS]


def _one_field(item: Any, token: str | None) -> str:
    """One wrong field of several, in a line."""
    if not isinstance(item, dict):
        return _text(item, token)
    field, detail = (_text(item.get(name), token) for name in ("field", "detail"))
    rest = [f"{name} {_text(item[name], token)}" for name in ("expected", "got") if item.get(name)]
    return ": ".join(part for part in (field, ", ".join([*([detail] if detail else []), *rest])) if part)
