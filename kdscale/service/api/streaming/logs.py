"""What a run printed: its last lines as text, or a stream that goes on as it prints more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from sse_starlette.event import ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.responses import PlainTextResponse

from kdscale.escaping import for_terminal
from kdscale.runs.folder import RunFolder
from kdscale.service.api.dependencies import READ, FoundRun
from kdscale.service.api.streaming.streams import StreamResponse, last_event_id, message, wants_stream
from kdscale.service.database.runs import Run
from kdscale.service.redaction import redacted_text
from kdscale.service.regular_files import open_regular
from kdscale.service.states import FINAL

router = APIRouter(prefix="/v1/runs", tags=["logs"], dependencies=[READ])
OUTPUT = "output.log"  # of an attempt's own folder, as every engine on this machine writes it
_EVERY_SECONDS = 0.5
_MOST_BYTES = 4 << 20  # of one answer
_MOST_AT_ONCE = 64 << 10  # of one message of a stream
# Each start of a run prints into a file of its own: ids of messages are the start times this, and the byte behind them.
_BYTES_OF_A_START = 10**10


@router.get("/{run_id}/logs", response_class=PlainTextResponse)
async def logs(
    run: FoundRun,
    request: Request,
    rank: Annotated[
        int | None, Query(ge=0, le=2**20, description="The log of one rank; else what the run printed.")
    ] = None,
    attempt: Annotated[
        int | None, Query(ge=1, le=2**20, description="Of which start; the last one when left out.")
    ] = None,
    tail: Annotated[int, Query(ge=0, le=100_000, description="Lines from the end.")] = 200,
    follow: Annotated[bool, Query(description="Go on as a stream of server-sent events.")] = False,
) -> Response:
    """The last lines of a run's log."""
    state = request.app.state
    file, begun = _log_file(state.settings.jobs, run, rank, attempt), 0
    if not (follow or wants_stream(request)):
        text = await run_in_threadpool(_text, state.engines, run, file, tail)
        return PlainTextResponse(text)
    last = last_event_id(request)
    if rank is None and attempt is None and run.origin == "service":  # then into the next start, too
        begun = max(run.attempt, 1)
        if last is not None:
            seen, last = divmod(last, _BYTES_OF_A_START)
            begun = max(1, min(seen, begun))
            file = _log_file(state.settings.jobs, run, None, begun)
    if last is not None and begun in (0, run.attempt or 1) and run.state in FINAL and last >= _size(file):
        return Response(status_code=204)  # by which a browser knows that there is no more
    if last is None:
        last = await run_in_threadpool(_start_of_tail, file, tail)
    return StreamResponse(state, _follow(request, run.id, file, last, begun))


def _log_file(jobs: Path, run: Run, rank: int | None, attempt: int | None) -> Path:
    """The file of a log; it may not be there."""
    if rank is not None:
        return RunFolder(run.folder).logs / f"rank-{rank}.log"
    if run.origin == "service":
        return jobs / run.id / str(attempt or max(run.attempt, 1)) / OUTPUT
    return RunFolder(run.folder).logs / "distill.log"


def last_lines(state: State, run: Run, tail: int, most: int = _MOST_BYTES) -> str:
    """The last `tail` lines of what a run printed, of its last `most` bytes. Raises what an engine does."""
    return _text(state.engines, run, _log_file(state.settings.jobs, run, None, None), tail, most)


def _text(engines: Mapping[str, object], run: Run, file: Path, tail: int, most: int = _MOST_BYTES) -> str:
    content = _read(file, max(0, _size(file) - most), most)
    engine = engines.get(str(run.target.get("engine", "local")))
    if not content and file.name == OUTPUT and run.handle and engine is not None:
        content = engine.logs(run.handle, most)  # type: ignore[attr-defined]
    lines = content.decode("utf-8", "replace").splitlines()
    return "".join(f"{_shown(line)}\n" for line in (lines[-tail:] if tail else []))


def _shown(line: str) -> str:
    return for_terminal(redacted_text(line))


def _size(file: Path) -> int:
    try:
        return file.stat(follow_symlinks=False).st_size
    except OSError:
        return 0


def _read(file: Path, start: int, most: int) -> bytes:
    """Bytes of a regular file from `start` on; empty where there is none."""
    try:
        stream = open_regular(file)
    except OSError:
        return b""
    with stream:
        stream.seek(start)
        return stream.read(most)


def _start_of_tail(file: Path, tail: int) -> int:
    """Where the last lines of a file begin."""
    start = max(0, _size(file) - _MOST_BYTES)
    lines = _read(file, start, _MOST_BYTES).split(b"\n")[:-1]
    return start + sum(len(line) + 1 for line in lines[: max(0, len(lines) - tail)])


async def _follow(request: Request, run_id: str, file: Path, start: int, begun: int) -> AsyncIterator[ServerSentEvent]:
    """Lines from byte `start` on, and the message `end` when the run has ended.

    `begun`: which start of the run has printed the file; the stream goes on with the next one. 0: only this file.
    """
    state, offset = request.app.state, start
    while True:
        run = await run_in_threadpool(state.runs.get, run_id)
        ended = run.state in FINAL
        has_next = 0 < begun < run.attempt
        complete = ended or has_next
        if await run_in_threadpool(_size, file) < offset:
            offset = 0  # of another file
        while whole := _whole_lines(await run_in_threadpool(_read, file, offset, _MOST_AT_ONCE), complete):
            offset += len(whole)
            text = whole.decode("utf-8", "replace").splitlines()
            yield message("\n".join(map(_shown, text)), begun * _BYTES_OF_A_START + offset)
        if has_next:
            begun, offset = begun + 1, 0
            file = _log_file(state.settings.jobs, run, None, begun)
            continue
        if ended:
            yield message("", begun * _BYTES_OF_A_START + offset, "end")
            return
        await asyncio.sleep(_EVERY_SECONDS)


def _whole_lines(content: bytes, ended: bool) -> bytes:
    """The whole lines at the beginning of some bytes; everything where no more will come, or a line has no end."""
    end = content.rfind(b"\n") + 1
    return content[:end] if end and not ended else content if ended or len(content) == _MOST_AT_ONCE else b""
