"""Every page, in the order in which their addresses are tried."""

from __future__ import annotations

from fastapi import APIRouter

from kdscale.service.page import actions, new_run, signing_in, static_files, views

router = APIRouter()
# /runs/new comes before /runs/{run_id}, and /runs/{run_id}/live before /runs/{run_id}/{action}
for part in (static_files.router, signing_in.router, new_run.router, views.router, actions.router):
    router.include_router(part)
