"""The HTTP application: what is known of the service, and every part of it that answers requests, one row each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

import kdscale
from kdscale.service.access.layers import add_access_layers
from kdscale.service.api import audit, catalogue, description, health, metrics, problems, runs
from kdscale.service.api.checking import validating
from kdscale.service.api.files import artifacts
from kdscale.service.api.streaming import events, logs
from kdscale.service.database.accounts import Accounts
from kdscale.service.database.answers import Answers
from kdscale.service.database.connection import Database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import Runs
from kdscale.service.mcp.endpoint import add_mcp, mcp_running
from kdscale.service.operations import background, exposing, requests
from kdscale.service.page import rendering
from kdscale.service.page import routes as page
from kdscale.service.settings import ServiceSettings

# What answers requests. A router of the API names its own prefix, /v1, and a scope for each of its routes.
ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    validating.router,
    runs.router,
    events.router,
    metrics.router,
    logs.router,
    artifacts.router,
    catalogue.router,
    audit.router,
    exposing.router,
    page.router,
)

# What every request passes through, the outermost last; each adds its middleware (or an ASGI application) to the app.
LAYERS: tuple[Callable[[FastAPI], None], ...] = (
    add_mcp, requests.install_innermost, add_access_layers, requests.install_outermost,
)  # fmt: skip

# What runs while the application does; entered in this order before the first request, left after the last one.
BACKGROUND: tuple[Callable[[FastAPI], AbstractAsyncContextManager[None]], ...] = (background.housekeeping, mcp_running)


def make_app(
    settings: ServiceSettings,
    database: Database,
    scheduler: Any | None = None,
    engines: Mapping[str, Any] | None = None,
    is_scheduling: Callable[[], bool] | None = None,
) -> FastAPI:
    """The application. `scheduler` is asked about its machine, and not run; `is_scheduling`: whether somebody runs it.

    `engines`: those that were made, by name. `app.state` has settings, database, runs, events, accounts, answers,
    scheduler, engines and is_scheduling.
    """
    # no pages of FastAPI's own: they load scripts from elsewhere
    app = FastAPI(
        title="kdscale", version=kdscale.__version__, summary=description.SUMMARY, lifespan=_lifespan, docs_url=None,
        redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.state.settings, app.state.database = settings, database
    app.state.runs, app.state.events = Runs(database), Events(database)
    app.state.accounts, app.state.answers = Accounts(database), Answers(database)
    app.state.scheduler, app.state.engines = scheduler, engines or {}
    app.state.is_scheduling = is_scheduling
    problems.install(app)
    rendering.install(app)
    for router in ROUTERS:
        app.include_router(router)
    for add in LAYERS:
        add(app)
    description.install(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for background in BACKGROUND:
            await stack.enter_async_context(background(app))
        yield
