"""GET /v1/audit: who did what, for admins."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from kdscale.service.access.identity import require
from kdscale.service.api.dependencies import Number
from kdscale.service.api.schemas import ListOf, as_time
from kdscale.service.redaction import redacted

router = APIRouter(prefix="/v1", tags=["audit"], dependencies=[Depends(require("admin"))])
Before = Annotated[Number | None, Query(description="The `next` of the page before.")]


class AuditLine(BaseModel):
    """Something that somebody did, or was refused."""

    model_config = ConfigDict(frozen=True)

    seq: int
    time: datetime | None
    actor: str = Field(examples=["ada"])
    action: str = Field(examples=["POST /v1/runs/{run_id}/cancel"])
    run_id: str | None
    detail: dict[str, Any] = Field(description="the answer's status, the token's id, and what the route says")
    address: str


@router.get("/audit")
def audit(
    request: Request, after: Before = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> ListOf[AuditLine]:
    """Who did what, the latest first."""
    entries = request.app.state.accounts.audit_log(before=after, limit=limit)
    lines = [
        AuditLine(**{**asdict(entry), "time": as_time(entry.time), "detail": redacted(entry.detail)})
        for entry in entries
    ]
    return ListOf(items=lines, next=str(entries[-1].seq) if len(entries) == limit else None)
