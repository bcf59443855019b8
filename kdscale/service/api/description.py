"""The description of the API at /openapi.json, made from the routes and the models of their bodies and answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

import kdscale
from kdscale.service.access.identity import SCOPES
from kdscale.service.api.bodies import body_schemas
from kdscale.service.problems import MEDIA_TYPE

SUMMARY = "Submits, watches and stops runs of kdscale."
_PROBLEM: dict[str, Any] = {
    "title": "Problem", "type": "object", "description": "What went wrong (RFC 9457).",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:kdscale:problem:state"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what is wrong"},
        "field": {"type": "string", "description": "the field that it is about"},
        "expected": {"type": "string"},
        "got": {"type": "string"},
        "hint": {"type": "string", "description": "what to do"},
        "request_id": {"type": "string", "description": "by which the service's log names this request"},
        "errors": {
            "type": "array", "description": "one entry for each wrong field",
            "items": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    },
}  # fmt: skip
_REFUSALS = {"401": "no valid token", "403": "a token without the scope", "404": "no such thing",
             "409": "it does not fit the run's state", "422": "a wrong parameter or body",
             "429": "too many requests"}  # fmt: skip


def install(app: FastAPI) -> None:
    """Have `app` describe itself, with problems and the bodies that json_body reads."""
    made_by_framework = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(made_by_framework())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def describe(routers: Iterable[APIRouter]) -> dict[str, Any]:
    """The description of these routers, without a service."""
    app = FastAPI(title="kdscale", summary=SUMMARY, version=kdscale.__version__)
    for router in routers:
        app.include_router(router)
    install(app)
    return app.openapi()


def _completed(tree: dict[str, Any]) -> dict[str, Any]:
    schemas = tree.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas |= {**body_schemas(), "Problem": _PROBLEM}
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path in tree["paths"].values():
        for operation in path.values():
            for status, text in _REFUSALS.items() if "security" in operation else ():
                operation["responses"][status] = {"description": text, "content": content}
    return tree


def scopes_of(routers: Iterable[APIRouter]) -> dict[tuple[str, str], str]:
    """The scope that each operation needs, by method and path as the description has them; "" for none."""
    found = {}
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute):
                asked = [getattr(one.call, "scope", "") for one in route.dependant.dependencies]
                scope = next((name for name in reversed(SCOPES) if name in asked), "")
                for method in route.methods or ():
                    found[method.lower(), route.path_format] = scope
    return found
