"""Whether the service is alive, and whether it can work: for supervisors and load balancers, without a token."""

from __future__ import annotations

import os
import shutil

from fastapi import APIRouter, Request
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

import kdscale
from kdscale.service.api.schemas import Health
from kdscale.service.problems import Problem

router = APIRouter(tags=["health"])
_LEAST_FREE_BYTES = 256 << 20


@router.get("/healthz")
def healthz() -> Health:
    """Whether the process answers at all."""
    return Health(status="ok", version=kdscale.__version__)


@router.get("/readyz")
def readyz(request: Request) -> Health:
    """Whether runs can be taken: the database answers, the home folder can be written, the scheduler works."""
    state = request.app.state
    home = state.settings.folder
    try:
        with state.database.read() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        raise Problem(503, "not-ready", "the database does not answer", hint="the service's log has more") from error
    if not os.access(home, os.W_OK) or shutil.disk_usage(home).free < _LEAST_FREE_BYTES:
        raise Problem(503, "not-ready", "the home folder is on a full disk, or cannot be written")
    if state.is_scheduling is not None and not state.is_scheduling():
        raise Problem(503, "not-ready", "the scheduler has stopped", hint="restart the service; its log has more")
    return healthz()
