"""What the routes of the API are given: who asks, and the run that the address names.

Whoever asks is checked first, so that a stranger learns nothing of what there is.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from kdscale.service.access.identity import Actor, require
from kdscale.service.database.runs import Run, Runs
from kdscale.service.ids import is_run_id
from kdscale.service.problems import Problem
from kdscale.service.states import UnknownRunError

Reader = Annotated[Actor, Depends(require("read"))]
Submitter = Annotated[Actor, Depends(require("run"))]

READ = Depends(require("read"))  # for a router whose routes do not ask who it is

Words = Annotated[str, Query(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Number = Annotated[int, Query(ge=0, le=2**53 - 1)]  # that JavaScript and every database can hold


def run_of_path(run_id: str, request: Request, _: Reader) -> Run:
    """The run of an address, once it is known who asks. Raises UnknownRunError, also for what is no id."""
    if not is_run_id(run_id):
        raise UnknownRunError(f"there is no run {run_id[:60]!r}")
    runs: Runs = request.app.state.runs
    return runs.get(run_id)


FoundRun = Annotated[Run, Depends(run_of_path)]


def check_may_change(actor: Actor, run: Run) -> None:
    """Raises a problem unless the run is the actor's own, or the actor an admin."""
    if not actor.may_change(run.owner):
        raise Problem(
            403, "scope", f"run {run.id} belongs to {run.owner}", expected="a run of your own, or the scope admin"
        )
