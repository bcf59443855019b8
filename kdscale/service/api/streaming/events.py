"""What happens to runs: pages of JSON with a cursor, or a stream that goes on where the client's last one broke off."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from kdscale.service.api.dependencies import READ, FoundRun, Number
from kdscale.service.api.schemas import ListOf, RunEvent
from kdscale.service.api.streaming.broadcaster import Broadcaster, Listener
from kdscale.service.api.streaming.streams import (
    STREAM_DESCRIPTION,
    StreamResponse,
    last_event_id,
    message,
    wants_stream,
)
from kdscale.service.database.events import Event

router = APIRouter(prefix="/v1", tags=["events"], dependencies=[READ])
After = Annotated[Number | None, Query(description="Only events behind this number; Last-Event-ID comes first.")]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/runs/{run_id}/events", response_model=ListOf[RunEvent], openapi_extra=STREAM_DESCRIPTION)
async def of_run(run: FoundRun, request: Request, after: After = None, limit: Limit = 200) -> Any:
    """What happened to a run, from its beginning; with `Accept: text/event-stream` also what happens next."""
    return await _answer(request, after or 0, limit, run.id)


@router.get("/events", response_model=ListOf[RunEvent], openapi_extra=STREAM_DESCRIPTION)
async def of_all(request: Request, after: After = None, limit: Limit = 200) -> Any:
    """What happened to all runs; a stream begins with what happens next, unless it is told where it was."""
    return await _answer(request, after, limit, None)


async def _answer(request: Request, after: int | None, limit: int, run_id: str | None) -> Response | ListOf[RunEvent]:
    state = request.app.state
    if not wants_stream(request):
        found = await run_in_threadpool(state.events.since, after or 0, run_id, limit)
        items = [RunEvent.of(event) for event in found]
        return ListOf[RunEvent](items=items, next=str(found[-1].seq) if found else None)
    last = last_event_id(request)
    if getattr(state, "broadcaster", None) is None:
        state.broadcaster = Broadcaster(state.events, written)
    broadcaster: Broadcaster = state.broadcaster
    listener = await broadcaster.listen(after if last is None else last, run_id)
    return StreamResponse(state, _contents(listener), lambda: broadcaster.leave(listener))


def written(event: Event) -> bytes:
    """An event as a message of a stream."""
    return message(RunEvent.of(event).model_dump_json(), event.seq).encode()


async def _contents(listener: Listener) -> AsyncIterator[bytes]:
    async for one in listener.messages():
        yield one.content
