"""`kdscale run` and the commands of its stages, `plan`, `report` and `status`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kdscale.cli.arguments import AcceptOption, ConfigArgument, RunArgument, SetOption, load, run_folder
from kdscale.errors import ConfigError, GateError
from kdscale.escaping import for_terminal


def _run_until(stage: str, name: str, overrides: list[str] | None, accept: bool) -> None:
    from kdscale.cli import tables
    from kdscale.pipeline.runner import run_until
    from kdscale.runtime.progress import Reporter

    config = load(name, overrides)
    reporter = Reporter()
    try:
        did = run_until(config, stage, reporter, accept_changes=accept)
    except GateError:  # everything is done; what failed is among the results
        tables.results(Path(config.run_dir), stage)
        raise
    if not did:
        reporter.say("Everything was done already; nothing to do.")
    tables.results(Path(config.run_dir), stage)


def stage_command(stage: str, help_text: str | None = None) -> Callable[..., None]:
    """A command that brings a run up to `stage`."""

    def command(config: ConfigArgument, set_: SetOption = None, accept_changes: AcceptOption = False) -> None:
        _run_until(stage, config, set_, accept_changes)

    command.__doc__ = help_text
    return command


def report_command(config: ConfigArgument, set_: SetOption = None) -> None:
    """Write report.html and report.json of what there is so far; starts no other stage."""
    from kdscale.cli import tables
    from kdscale.pipeline.runner import report_so_far
    from kdscale.runtime.progress import Reporter

    loaded = load(config, set_)
    report_so_far(loaded, Reporter())
    tables.results(Path(loaded.run_dir), "report")


def plan_command(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A YAML file or a shipped config; may be left out with --teacher."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A model folder or hf:org/name, in place of the config's teacher."),
    ] = None,
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
        int | None,
        typer.Option(min=0, max=65_536, metavar="N", help="Run the N best predicted shapes masked; 0: none."),
    ] = None,
    probe_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Distil N tokens into each finalist, halve, double, repeat.")
    ] = None,
    shapes_only: Annotated[
        bool,
        typer.Option("--shapes-only", help="Compare shapes by the teacher's config.json alone; write nothing."),
    ] = False,
) -> None:
    """Choose the student's shape and every index that is kept, and show what else was compared.

    With --teacher and a target but no CONFIG, shapes are compared by the teacher's config.json alone.
    """
    from kdscale.cli import tables
    from kdscale.units import BUDGET_FIELDS

    targets = {
        "target_params": target_params, "target_bytes": target_bytes, "target_kv_bytes": target_kv_bytes,
        "target_decode": target_decode, "target_prefill": target_prefill,
    }  # fmt: skip
    overrides = list(set_ or [])
    if any(value is not None for value in targets.values()):  # takes the place of the config's target
        overrides += [f"prune.{name}={targets[name] or 'null'}" for name in BUDGET_FIELDS]
    for key, value in (("masked_candidates", masked), ("probe_tokens", probe_tokens)):
        overrides += [] if value is None else [f"prune.search.{key}={value}"]
    overrides += [] if teacher is None else [f"teacher.path={teacher}"]
    if config is None and (teacher is None or not any(targets.values())):
        raise ConfigError(
            "kdscale plan",
            expected="a CONFIG, or --teacher MODEL and a target such as --target-params 50%",
            hint="kdscale init asks for what a config needs, and writes one",
        )
    if shapes_only or config is None:
        from kdscale.config.load import build_config
        from kdscale.pipeline.checks import plan_shapes
        from kdscale.weights import resolve_teacher

        loaded = (
            load(config, overrides)
            if config
            else build_config({"name": "plan", "run_dir": "runs/plan"}, "what was asked", overrides)
        )
        found = plan_shapes(loaded, resolve_teacher(loaded.teacher, config_only=True))
        if len(found) <= len(loaded.steps):
            raise ConfigError(
                "--shapes-only",
                expected="a target that config.json tells",
                got="a latency",
                hint="a latency is measured: give a CONFIG and leave out --shapes-only",
            )
        cut_from = ("teacher", *(f"step {step.name}" for step in loaded.steps))
        for step, one, pruned in zip((*loaded.steps, None), found, cut_from, strict=True):
            tokens = loaded.distill.tokens if step is None else loaded.step(loaded.steps.index(step)).distill.tokens
            tables.plan(one.model_dump(), tokens, step.name if step else "", pruned)
        if config is None:
            typer.echo(for_terminal(f"to go on: kdscale init --teacher {shlex.quote(str(teacher))}"))
        return
    _run_until("plan", config, overrides, accept_changes)


def status_command(
    run: RunArgument,
) -> None:
    """Show how far a run is, how long it still takes, its results and where they are."""
    from kdscale.cli import tables

    tables.status(run_folder(run))
