"""A finished run as a folder to serve and share, and that folder on the hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdscale.cli.arguments import RunArgument, load, run_folder
from kdscale.escaping import for_terminal

if TYPE_CHECKING:
    from kdscale.packaging.bundle.publish import Upload

_MOST_SHOWN = 40


def package_command(
    run: RunArgument,
    forms: Annotated[
        str | None,
        typer.Option(metavar="FORM,...", help="bf16, unchanged, gguf-q8_0, or one of the run's quantised forms."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; RUN/package by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a package that is there.")] = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Leave out the report, which shows the run's config and its paths.")
    ] = False,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="As the hub calls it; the teacher's by default.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="What the hub calls the teacher, if that is not known.")
    ] = None,
) -> None:
    """Write the student of a finished run as a folder to serve and share: forms, card, report, checksums, a test.

    By default bf16, the quantised forms of the run, and a GGUF file where the family has one.
    """
    from kdscale.jobs.package import package_run
    from kdscale.runtime.progress import Reporter

    named = {"license": license_, "base_model": base_model}
    target = package_run(
        load(str(run_folder(run)), None), forms, out, Reporter(),
        overrides={name: value for name, value in named.items() if value}, replace=replace,
        report=not no_report,
    )  # fmt: skip
    quoted = shlex.quote(str(target))
    typer.echo(for_terminal(f"test it:    python {shlex.quote(str(target / 'smoke_test.py'))}"))
    typer.echo(for_terminal(f"publish it: kdscale publish {quoted} --to ORG/NAME"))


def publish_command(
    package: Annotated[Path, typer.Argument(help="A folder that kdscale package made.")],
    to: Annotated[str, typer.Option(metavar="ORG/NAME", help="The repository of the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify and show; ask the hub nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Upload a package to the model hub: only its own files, their checksums verified, after asking.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from kdscale.packaging.bundle import publish

    item = publish.prepare(package, to, private)
    _show(item)
    if dry_run:
        typer.echo("nothing was uploaded")
        return
    from huggingface_hub import HfApi

    api = HfApi()
    there = publish.already_there(api, to)
    if there is None:
        typer.echo(for_terminal(f"{to} is not there yet, or not yours to see; it will be {_kind(private)}"))
    else:
        both = len(set(there) & set(item.files))
        typer.echo(for_terminal(f"{to} has {len(there)} files; {both} of them will be replaced, and none deleted"))
        if private:
            typer.echo("  note: --private changes no repository that is there")
    if not yes:
        typer.confirm("Upload?", abort=True)
    address = publish.upload(api, item, f"Upload {item.folder.resolve().name} by kdscale")
    typer.echo(for_terminal(f"published: {address}"))


def _kind(private: bool) -> str:
    return "private" if private else "public"


def _show(item: Upload) -> None:
    from kdscale.units import format_size

    typer.echo(for_terminal(f"{item.folder}: {len(item.files)} files, {format_size(item.nbytes)}, checksums verified"))
    for name in item.files[:_MOST_SHOWN]:
        typer.echo(for_terminal(f"  {format_size((item.folder / name).stat().st_size):>10}  {name!s}"))
    if len(item.files) > _MOST_SHOWN:
        typer.echo(f"  … and {len(item.files) - _MOST_SHOWN} more")
    for name in item.left_out[:_MOST_SHOWN]:
        typer.echo(for_terminal(f"  left out, as it is not part of the package: {name}"))
