"""`kdscale runs`, `logs`, `pause`, `resume`, `cancel` and `rerun`: a service's runs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated

import typer

from kdscale.cli.arguments import SetOption
from kdscale.cli.service.options import HERE, InsecureOption, RunIdArgument, ServerOption, connect
from kdscale.escaping import for_terminal

if TYPE_CHECKING:
    from collections.abc import Callable

    from kdscale.client import Client, Run


def runs_command(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Show this one, with its stages.")] = None,
    state: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help="Only runs that are queued, running ... Repeatable.")
    ] = None,
    owner: Annotated[str | None, typer.Option(metavar="NAME", help="Only runs of this owner.")] = None,
    search: Annotated[str | None, typer.Option(metavar="TEXT", help="Only runs with this in name or id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, metavar="N", help="At most N runs, the newest.")] = 20,
    server: ServerOption = HERE,
    insecure_http: InsecureOption = False,
) -> None:
    """List a service's runs, or show one."""
    from kdscale.cli.service.show import check_states, show_run, show_runs

    states = check_states(state or ())
    with connect(server, insecure_http) as client:
        if run is not None:
            show_run(client.run(run))
        else:
            found = client.runs(states=states, owner=owner, search=search, page=min(limit + 1, 500))
            show_runs(list(itertools.islice(found, limit + 1)), limit)


def logs_command(
    run: RunIdArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    tail: Annotated[int, typer.Option(min=0, max=100_000, metavar="N", help="Begin with the last N lines.")] = 200,
    rank: Annotated[
        int | None, typer.Option(min=0, max=2**20, metavar="N", help="What one process of the training printed.")
    ] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, max=2**20, metavar="N", help="Of the run's N-th start; by default the last.")
    ] = None,
    server: ServerOption = HERE,
    insecure_http: InsecureOption = False,
) -> None:
    """Show what a run printed."""
    with connect(server, insecure_http, waits=follow) as client:
        for line in client.logs(run, tail=tail, rank=rank, attempt=attempt, follow=follow):
            typer.echo(for_terminal(line))


def pause_command(run: RunIdArgument, server: ServerOption = HERE, insecure_http: InsecureOption = False) -> None:
    """Have a run save and free its devices; resume goes on from there."""
    _ask(run, server, insecure_http, lambda client: client.pause(run))


def resume_command(run: RunIdArgument, server: ServerOption = HERE, insecure_http: InsecureOption = False) -> None:
    """Queue a paused, failed or cancelled run again; it goes on with what it saved."""
    _ask(run, server, insecure_http, lambda client: client.resume(run))


def cancel_command(run: RunIdArgument, server: ServerOption = HERE, insecure_http: InsecureOption = False) -> None:
    """Stop a run; what it made is kept."""
    _ask(run, server, insecure_http, lambda client: client.cancel(run))


def rerun_command(
    run: RunIdArgument,
    set_: SetOption = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What lists call the new run.")] = None,
    server: ServerOption = HERE,
    insecure_http: InsecureOption = False,
) -> None:
    """Make a new run with the config of another one, from its beginning."""
    _ask(run, server, insecure_http, lambda client: client.rerun(run, set=list(set_ or []), name=name))


def _ask(run_id: str, server: str, insecure_http: bool, ask: Callable[[Client], Run]) -> None:
    from kdscale.cli.service.show import in_words

    with connect(server, insecure_http) as client:
        run = ask(client)
    new = "" if run.id == run_id else f"new run {run.id}: "
    typer.echo(for_terminal(new + in_words(run)))
