"""`kdscale serve-teacher`: the teacher in a process of its own, on machines that train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdscale.cli.arguments import ConfigArgument, SetOption
from kdscale.errors import ConfigError


def serve_teacher_command(
    config: ConfigArgument,
    set_: SetOption = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    token_file: Annotated[
        Path | None, typer.Option(help="Where the token is, or is to be written. Default: teacher.token in the run.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one question.")] = 65_536,
) -> None:
    """Answer the ranks' questions with the teacher of CONFIG, for distill.teacher_placement: served."""
    from importlib.util import find_spec

    from kdscale.cli.shipped import find_config
    from kdscale.config import load_config

    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "kdscale serve-teacher", expected="starlette and uvicorn", got=f"no {', no '.join(missing)}",
            hint="pip install 'kdscale[serve]'",
        )  # fmt: skip
    loaded = load_config(find_config(config), set_ or [])
    from kdscale.runs.teacher_service import start

    start(loaded, host=host, port=port, token_file=token_file, max_tokens=max_tokens)
