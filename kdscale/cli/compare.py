"""`kdscale compare`: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kdscale.cli.arguments import run_folder
from kdscale.cli.service.options import InsecureOption, connect
from kdscale.errors import ConfigError, raise_together
from kdscale.escaping import for_terminal
from kdscale.units import compact_count

# What of a comparison fits on a terminal.
_OF_COMPARISON = {
    "parameters": "params", "weight_bytes": "on disk", "perplexity": "perplexity", "kl_to_teacher": "KL",
    "accuracy": "accuracy", "decode_tokens_per_second": "tokens/s",
}  # fmt: skip


def compare_command(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders, or the configs they were made from.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where compare.html and compare.json go.")] = Path("compare"),
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="RUN are ids of runs of this service; it shows the page.")
    ] = None,
    insecure_http: InsecureOption = False,
) -> None:
    """Show runs side by side, also unfinished ones, and write a page with plots of quality against size and speed."""
    if server is not None:
        with connect(server, insecure_http) as client:
            _show(client.compare(runs), f"{client.url}/compare?{'&'.join(f'run={run}' for run in runs)}")
        return
    from kdscale.report.compare.page import write_comparison

    folders, problems = list[Path](), list[ConfigError]()
    for name in runs:
        try:
            folders.append(run_folder(name))
        except ConfigError as error:
            problems.append(error)
    if problems and not any(Path(name).exists() for name in runs):
        typer.echo("note: for runs of a service give its address too: --server URL", err=True)
    raise_together(problems)
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ConfigError("the runs to compare", expected="two or more different runs", got=", ".join(runs))
    _show(write_comparison(folders, out), str(out / "compare.html"))


def _show(facts: dict[str, Any], page: str) -> None:
    """The models of several runs, a line each; what is damaged or not comparable; where the page is."""
    from kdscale.cli import tables

    columns = [column for column in facts["columns"] if column["key"] in _OF_COMPARISON]
    rows = [
        (
            model["run"],
            model["title"],
            compact_count(model["trained_tokens"]) if model["trained_tokens"] else "",
            *(_compared_cell(model, column) for column in columns),
        )
        for model in facts["models"]
    ]
    titles = ("run", "model", "tokens", *(_OF_COMPARISON[column["key"]] for column in columns))
    if rows:
        Console().print(tables.table(f"{len(facts['runs'])} runs", titles, rows, right_from=2))
    for run in facts["runs"]:
        lacks = "".join(f"; no {what}" for what in run["lacks"])
        if run["state"] != "finished":
            tables.note(f"note: {run['label']} is {run['state']}{lacks}")
        for what in run["damage"]:
            tables.note(f"warning: {run['label']}: {what}")
    for item in facts["unlike"]:
        named = ", ".join(setting["name"] for setting in item["settings"])
        tables.note(f"≠ {item['run']} measured {item['figures']} otherwise than {item['first_run']}: {named}")
    Console(soft_wrap=True).print(for_terminal(f"page: {page}"), highlight=False, markup=False)


def _compared_cell(model: dict[str, Any], column: dict[str, Any]) -> str:
    cell = model["figures"].get(column["key"])
    return "" if cell is None else cell["text"] + (" ≠" if column["kind"] in model["unlike"] else "")
