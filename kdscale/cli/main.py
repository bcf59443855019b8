"""The command line. Imports are lazy: help, status and a finished run never load torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kdscale.cli import chat, compare, init, launch, models, package, plan_cluster, replay, run, sweep
from kdscale.cli.service import download, housekeeping, login, serve, submit, token
from kdscale.cli.service import runs as service_runs
from kdscale.errors import ConfigError, FileError, Interrupted, KdscaleError
from kdscale.pipeline.stages.registry import STAGES
from kdscale.runtime.exits import exit_code_of, leave

SERVICE = "A service"  # the group of commands that is about one


def _without_bool(params: list[Any]) -> list[Any]:
    """The parameters of a command; help shows no `<bool>` behind flags, which take no value."""
    for item in params:
        if getattr(item, "is_flag", False) and item.metavar is None:
            item.metavar = ""
    return params


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_bool(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_bool(super().get_params(ctx))


def make_app() -> typer.Typer:
    """The command line in groups, the most used first; a stage that has a help text is a command by itself."""
    app = typer.Typer(
        name="kdscale",
        cls=_Group,
        help="Prune a language model to a budget, distil the teacher back into it, and show the result.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    app.callback()(_root)
    for title, commands in _groups().items():
        for name, command in commands.items():
            app.command(name, cls=_Command, rich_help_panel=title)(command)
        if title == SERVICE:
            tokens = typer.Typer(cls=_Group, help=token.HELP, no_args_is_help=True)
            for inner, inner_command in token.COMMANDS.items():
                tokens.command(inner, cls=_Command)(inner_command)
            app.add_typer(tokens, name="token", rich_help_panel=title)
    return app


def _groups() -> dict[str, dict[str, Callable[..., None]]]:
    """Every command by its name, under the title of its group in `kdscale --help`."""
    everyday: dict[str, Callable[..., None]] = {
        "init": init.init_command,
        "plan": run.plan_command,
        "run": run.stage_command(list(STAGES)[-1], f"Run every stage: {', '.join(STAGES)}. Finished ones are kept."),
        "status": run.status_command,
        "report": run.report_command,
        "compare": compare.compare_command,
    }
    return {
        "Every day": everyday,
        "One stage, and what it needs": {
            stage.name: run.stage_command(stage.name, stage.help)
            for stage in STAGES.values()
            if stage.help and stage.name not in everyday
        },
        "Several machines": {
            "plan-cluster": plan_cluster.plan_cluster_command,
            "preflight": launch.preflight_command,
            "launch": launch.launch_command,
            "serve-teacher": models.serve_teacher_command,
        },
        SERVICE: {
            "serve": serve.serve_command,
            "login": login.login_command,
            "submit": submit.submit_command,
            "runs": service_runs.runs_command,
            "logs": service_runs.logs_command,
            "pause": service_runs.pause_command,
            "resume": service_runs.resume_command,
            "cancel": service_runs.cancel_command,
            "rerun": service_runs.rerun_command,
            "download": download.download_command,
            "retention": housekeeping.retention_command,
            "backup": housekeeping.backup_command,
        },
        "Tools": {
            "doctor": doctor_command,
            "inspect": models.inspect_command,
            "chat": chat.chat_command,
            "families": models.families_command,
            "get-teacher": models.get_teacher_command,
            "export": models.export_command,
            "export-gguf": models.export_gguf_command,
            "package": package.package_command,
            "publish": package.publish_command,
            "sweep": sweep.sweep_command,
            "export-megatron": models.export_megatron_command,
            "replay": replay.replay_command,
        },
    }


def doctor_command(
    folder: Annotated[Path, typer.Argument(help="Where runs will be written.")] = Path("runs"),
) -> None:
    """Check this machine and say what will and won't work. Exit code 1 when a run cannot work."""
    from kdscale.cli import tables
    from kdscale.jobs.doctor import examine, verdicts

    examination = examine(folder)
    conclusions = verdicts(examination)
    tables.findings("This machine", examination.findings)
    tables.findings("What follows", conclusions)
    if any(item.severity == "bad" for item in conclusions):
        raise typer.Exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        import kdscale

        typer.echo(f"kdscale {kdscale.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake is one message and an exit code, never a traceback."""
    # Read by OpenMP when torch is loaded. Threads that wait by spinning starve each other as soon as anything else runs
    # on the same cores: on two busy cores a forward pass was measured 8 times faster with waiting threads asleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _open_standard_streams()
    try:
        code = make_app()(standalone_mode=False) or 0
    except typer.Abort:  # Ctrl-C, or the end of the input, at a question
        print("\nstopped", file=sys.stderr)
        code = 130
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except Interrupted as stop:
        print(f"{stop}; run the same command again to go on", file=sys.stderr)
        code = exit_code_of(stop)
    except OSError as error:
        if error.filename is None:  # not about a file: a bug
            raise
        # whatever a name on the command line or in a config leads to: too long, a loop of links, forbidden
        problem = FileError(f"{str(error.filename)[:200]} cannot be used", got=error.strerror)
        print(f"error: {problem}", file=sys.stderr)
        code = problem.exit_code
    except Exception as error:
        # Wrong command lines (typer's own classes) print their usage themselves; the rest is a bug and keeps its trace.
        show_error = getattr(error, "show", None)
        if show_error is None:
            raise
        show_error()
        code = getattr(error, "exit_code", ConfigError.exit_code)
    leave(code)


def _open_standard_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) silent ones.

    The next file that is opened would take their numbers, and what libraries print would land in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (a number; as long as the process)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    main()
