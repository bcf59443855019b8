"""The JSON body of a request, read after the sender was let in, and as carefully as any file that others wrote."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect, Request

from kdscale.errors import ConfigError
from kdscale.files import parse_json
from kdscale.service.problems import Problem, fields_of

Body = TypeVar("Body", bound=BaseModel)
_JSON = "application/json"
_MODELS: dict[str, type[BaseModel]] = {}  # of bodies, by name
_REFERENCES = "#/components/schemas/{model}"


def json_body(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that gives the body as a `model`; an empty body counts as `{}`.

    It comes after the one that checks the sender, so that nothing of a stranger's body is read or parsed.
    """

    async def read(request: Request) -> Body:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await _read(request)
        if body and kind != _JSON:
            raise Problem(415, "media-type", "the body is of a type that is not read", expected=_JSON, got=kind[:100])
        try:
            tree = parse_json(body.decode("utf-8"), "the body", ConfigError, expect=dict, unique=True) if body else {}
        except UnicodeDecodeError as error:
            raise Problem(422, "request", "the body is not UTF-8 text", got=str(error)[:200]) from error
        try:
            return model.model_validate(tree)
        except ValidationError as error:
            raise Problem(
                422, "request", "the body has fields that cannot be used", errors=fields_of(error, model=model)
            ) from error

    return read


async def _read(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise Problem(400, "request", "the connection ended within the body") from error


def described(model: type[BaseModel]) -> dict[str, Any]:
    """What the description of an operation says of its body: `openapi_extra` of its route."""
    _MODELS[model.__name__] = model
    return {"requestBody": {"content": {_JSON: {"schema": {"$ref": _REFERENCES.format(model=model.__name__)}}}}}


def body_schemas() -> dict[str, Any]:
    """The JSON schemas that `described` refers to, by name."""
    _, definitions = models_json_schema([(model, "validation") for model in _MODELS.values()], ref_template=_REFERENCES)
    return dict(definitions["$defs"])
