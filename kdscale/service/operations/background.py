"""What runs in threads beside the application: the notices and the retention."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from kdscale.service.notices.sender import Notices
from kdscale.service.operations.retention import Retention

_SECONDS_TO_STOP = 5.0  # a notice that is being sent may take longer; it is sent again after its lease


@asynccontextmanager
async def housekeeping(app: FastAPI) -> AsyncIterator[None]:
    """Deliver notices; delete what is due, while this process is the one that schedules."""
    state = app.state
    notices = await run_in_threadpool(Notices, state.settings, state.database)
    retention = Retention(state.settings, state.database, notices)
    leads: Callable[[], bool] = getattr(state.scheduler, "leads", lambda: False)
    stop = threading.Event()
    threads = [
        threading.Thread(target=notices.run_forever, args=(stop,), name="notices", daemon=True),
        threading.Thread(target=retention.run_forever, args=(stop, leads), name="retention", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            await run_in_threadpool(thread.join, _SECONDS_TO_STOP)
