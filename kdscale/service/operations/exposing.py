"""GET /metrics, for Prometheus: with a token that may read, or without where the settings say so."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from kdscale.service.access.identity import require
from kdscale.service.operations.metrics import CONTENT_TYPE, ServiceMetrics

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Figures of the service in Prometheus's text format."""
    if not request.app.state.settings.public_metrics:
        await require("read")(request, None)
    found: ServiceMetrics = request.app.state.metrics
    return Response(await run_in_threadpool(found.text), media_type=CONTENT_TYPE)
