"""What every request passes on its way to a route: a row of app.LAYERS."""

from __future__ import annotations

from fastapi import FastAPI

from kdscale.service.access.audit import AuditMiddleware
from kdscale.service.access.headers import HeadersMiddleware
from kdscale.service.access.limits import LimitsMiddleware


def add_access_layers(app: FastAPI) -> None:
    """Add them; the last one is the outermost, so that every answer has the headers."""
    app.add_middleware(AuditMiddleware)
    app.add_middleware(LimitsMiddleware, settings=app.state.settings)
    app.add_middleware(HeadersMiddleware, settings=app.state.settings)
