"""`kdscale sweep`: many short runs of one config with other values, and the best of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdscale.errors import Interrupted


def sweep_command(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A YAML file with base, folder and search.")],
    workers: Annotated[int, typer.Option(min=1, max=256, help="Trials that run at once, on this machine.")] = 1,
) -> None:
    """Try values of a config's fields on a small budget, and write the config of the best; finished trials are kept."""
    from kdscale.cli import tables
    from kdscale.config.sweep import load_sweep
    from kdscale.jobs.sweep.results import table_of, write_results
    from kdscale.jobs.sweep.space import base_config, check_space
    from kdscale.jobs.sweep.trials import open_study, run_sweep
    from kdscale.runtime.packages import require_packages
    from kdscale.runtime.progress import Reporter

    require_packages("kdscale sweep", ("optuna",), "sweep")
    settings, reporter = load_sweep(sweep), Reporter()
    base = base_config(settings)
    check_space(settings, base)
    try:
        study = run_sweep(settings, base, workers, reporter)
    except Interrupted:
        write_results(settings, open_study(settings))
        raise
    facts = write_results(settings, study)
    columns, rows = table_of(facts)
    tables.trials(facts["verdict"], columns, rows)
    best = f", {settings.folder}/best.yaml the best config" if any(trial["best"] for trial in facts["trials"]) else ""
    reporter.say(f"{settings.folder}/sweep.html has the plots{best}")
