"""Pages that show: the list of runs, a run, runs side by side, the machine; and the parts of them that change."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from kdscale.service.api.dependencies import FoundRun, Reader
from kdscale.service.ids import is_run_id
from kdscale.service.page.facts import machine as machine_facts
from kdscale.service.page.facts import one_run, run_rows
from kdscale.service.page.facts.comparison import MOST_RUNS, compare
from kdscale.service.page.rendering import PageRoute, render
from kdscale.service.states import ACTIVE, STATES

router = APIRouter(include_in_schema=False, route_class=PageRoute)
_ROWS = 50
_CHOICES = 100  # runs that the fields of a comparison offer
Words = Annotated[str, Query(max_length=200)]


@router.get("/")
def start() -> Response:
    """The list is the first page."""
    return RedirectResponse("/runs", 303)


@router.get("/runs")
def runs(
    request: Request, _: Reader, state: Words = "", owner: Words = "", search: Words = "", after: Words = ""
) -> Response:
    """The runs, the newest first."""
    values = _list(request, state, owner, search, after)
    state_ = request.app.state
    return render(
        request, "runs.html.j2", "Runs", here="/runs", owners=state_.runs.owners(), last_event=state_.events.last_seq(),
        live_path=_address("/runs/live", values["filters"]), **values,
    )  # fmt: skip


@router.get("/runs/live")
def runs_live(
    request: Request, _: Reader, state: Words = "", owner: Words = "", search: Words = "", after: Words = ""
) -> Response:
    """The part of the list that changes."""
    return render(request, "runs_live.html.j2", "Runs", **_list(request, state, owner, search, after))


def _list(request: Request, state: str, owner: str, search: str, after: str) -> dict[str, Any]:
    known = request.app.state.runs
    filters = {
        "state": state if state in STATES else "", "owner": owner, "search": search.strip(),
        "after": after if is_run_id(after) else "",
    }  # fmt: skip
    page = known.page(
        states=[filters["state"]] if filters["state"] else (), owner=owner or None, search=filters["search"],
        after=filters["after"] or None, limit=_ROWS,
    )  # fmt: skip
    return {
        "rows": [run_rows.row(run) for run in page.items], "counts": known.counts(), "states": STATES,
        "filters": filters, "filtered": any(filters.values()),
        "ended": not any(run.state in ACTIVE for run in page.items),
        "older": _address("/runs", {**filters, "after": page.next}) if page.next else "",
        "newest": _address("/runs", {**filters, "after": ""}),
    }  # fmt: skip


def _address(path: str, values: dict[str, str]) -> str:
    query = urlencode({name: value for name, value in values.items() if value})
    return f"{path}?{query}" if query else path


@router.get("/runs/{run_id}")
def one(request: Request, run: FoundRun, actor: Reader) -> Response:
    """A run, whole."""
    last_event = request.app.state.events.last_seq()
    values = one_run.live(request.app.state, run, actor) | one_run.unchanging(run)
    return render(request, "run.html.j2", run.name, last_event=last_event, **values)


@router.get("/runs/{run_id}/live")
def one_live(request: Request, run: FoundRun, actor: Reader) -> Response:
    """The part of a run that changes."""
    return render(request, "run_live.html.j2", run.name, **one_run.live(request.app.state, run, actor))


@router.get("/runs/{run_id}/files")
def files(request: Request, run: FoundRun, _: Reader) -> Response:
    """The list of a run's files, asked for when it is opened."""
    return render(request, "run_files.html.j2", run.name, run=run, **one_run.files(run))


@router.get("/compare")
def compared(request: Request, _: Reader, run: Annotated[list[str], Query(max_length=20)] = []) -> Response:  # noqa: B006
    """Runs side by side."""
    known = request.app.state.runs
    chosen = [known.get(each) for each in dict.fromkeys(run) if is_run_id(each)][:MOST_RUNS]
    found = compare(request.app.state, chosen) if len(chosen) > 1 else None
    offered = {each.id: each for each in [*chosen, *known.page(limit=_CHOICES).items]}
    fields = [each.id for each in chosen] + [""] * max(1 if len(chosen) < MOST_RUNS else 0, 2 - len(chosen))
    return render(
        request, "compare.html.j2", "Compare runs", here="/compare", choices=list(offered.values()), slots=fields,
        facts=found.facts if found else None, ids=[each.id for each in found.runs] if found else [],
        charts=found.charts if found else [], legend=found.legend if found else [], notes=found.notes if found else [],
    )  # fmt: skip


@router.get("/machine")
def machine(request: Request, _: Reader) -> Response:
    """Devices, slots, queue and disk."""
    return render(
        request, "machine.html.j2", "Machine", here="/machine", last_event=request.app.state.events.last_seq(),
        **machine_facts.live(request),
    )  # fmt: skip


@router.get("/machine/live")
def machine_live(request: Request, _: Reader) -> Response:
    """The part of it that changes: all."""
    return render(request, "machine_live.html.j2", "Machine", **machine_facts.live(request))
