"""`kdscale export`: the student of any checkpoint as a standard safetensors folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; the run may be going on.")],
    step: Annotated[int | None, typer.Option(min=1, help="Which checkpoint; the newest by default.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; RUN/exported/step-N by default.")] = None,
) -> None:
    """Write the student of a checkpoint as a standard safetensors folder, in bounded memory."""
    from kdscale.progress import Reporter
    from kdscale.runs.exporting import export_run

    export_run(run, step, out, Reporter())
