"""`kdscale submit`: hand a config to a service, and wait for the run if asked to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdscale.cli.arguments import SetOption
from kdscale.cli.service.options import HERE, InsecureOption, ServerOption, connect
from kdscale.errors import ConfigError
from kdscale.escaping import for_terminal

if TYPE_CHECKING:
    from kdscale.client import Client, Run, RunDetail

_MAX_BYTES = 256 << 10  # of a config


def submit_command(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config or the id of a run there.")
    ],
    set_: SetOption = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What lists call the run.")] = None,
    priority: Annotated[
        int, typer.Option(min=-1000, max=1000, metavar="N", help="Before runs of a lower priority.")
    ] = 0,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Where it runs: engine=slurm, and the engine's settings. Repeatable."),
    ] = None,
    notify: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Who is told of it: https://... (a webhook) or mailto:... Repeatable."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it can be run, and what it needs.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until the run has ended, with its exit code.")] = False,
    server: ServerOption = HERE,
    insecure_http: InsecureOption = False,
) -> None:
    """Submit a run to a service that kdscale serve started.

    Paths in the config are those of the service's machine.
    """
    from kdscale.cli.service.show import shown_verdict

    spec = _spec(config) | {"set": list(set_ or [])}
    with connect(server, insecure_http, waits=wait) as client:
        if check:
            raise typer.Exit(0 if shown_verdict(client.validate(**spec)) else ConfigError.exit_code)
        run = client.submit(**spec, name=name, priority=priority, target=_target(target), notify=notify or ())
        typer.echo(for_terminal(f"submitted {run.name} as {run.id}; it is {run.state}"))
        if not wait:
            typer.echo(for_terminal(f"  watch it: kdscale logs {run.id} --follow, or {client.url}/runs/{run.id}"))
            return
        raise typer.Exit(exit_code_of(wait_for(client, run)))


def wait_for(client: Client, run: Run) -> RunDetail:
    """Wait until a run has ended; every change of its state or stage is a line."""
    from kdscale.cli.service.show import in_words

    last = ""

    def told(now: RunDetail) -> None:
        nonlocal last
        stage = f", {now.progress['stage']}" if now.state == "running" and now.progress.get("stage") else ""
        if now.state + stage != last:
            last = now.state + stage
            typer.echo(for_terminal(in_words(now)))

    try:
        return client.wait(run.id, told=told)
    except KeyboardInterrupt:
        typer.echo(for_terminal(f"the run goes on; kdscale cancel {run.id} stops it"), err=True)
        raise


def exit_code_of(run: RunDetail) -> int:
    """What `kdscale run` would have ended with: 0 for a run that succeeded, 75 for one that was stopped."""
    from kdscale_launch import STOPPED_EXIT_CODE

    if run.state == "succeeded":
        return 0
    otherwise = STOPPED_EXIT_CODE if run.state == "cancelled" else 1
    return run.exit_code if run.exit_code is not None and 0 < run.exit_code < 256 else otherwise


def _spec(config: str) -> dict[str, Any]:
    """A file here is sent as what it holds; anything else is a name that the service knows."""
    from kdscale.config.load import parse_yaml
    from kdscale.files import read_text

    path = Path(config)
    if path.is_dir():
        path /= "config.yaml"
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
            raise ConfigError(f"config {config[:200]} does not exist", expected="a YAML file, or a name")
        return {"config_name": config}
    tree = parse_yaml(read_text(path, ConfigError, _MAX_BYTES), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds no settings", expected="a mapping", got=type(tree).__name__)
    return {"config": tree}


def _target(settings: list[str] | None) -> dict[str, Any] | None:
    """`engine=slurm`, `partition=gpu` and so on as a mapping; values are YAML, so that numbers are numbers."""
    from kdscale.config.load import parse_yaml

    found: dict[str, Any] = {}
    for setting in settings or ():
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise ConfigError("--target", expected="KEY=VALUE", got=setting[:100])
        found[key.strip()] = parse_yaml(value, f"--target {key}")
    return found or None
