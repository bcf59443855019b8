"""`kdscale replay`: run one training step of a run again, alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdscale.cli.arguments import RunArgument, SetOption, run_folder

_SHOWN_GROUPS, _SHOWN_CHARS = 12, 72


def replay_command(
    run: RunArgument,
    step: Annotated[
        int,
        typer.Option(
            "--step", min=1, max=9_999_999, metavar="N", help="The step, as the log and metrics.jsonl count them."
        ),
    ],
    max_steps: Annotated[
        int,
        typer.Option(
            "--max-steps",
            min=0,
            max=99_999,
            metavar="N",
            help="Most steps to train again between a checkpoint and the step.",
        ),
    ] = 200,
    from_checkpoint_only: Annotated[
        bool, typer.Option("--from-checkpoint-only", help="Use the nearest checkpoint's weights as they are.")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Run one step of RUN again, alone: loss by sequence, gradient norm by layer, documents. The run is not changed."""
    from kdscale.distill.replay import replay_step
    from kdscale.runtime.progress import Reporter

    result, file = replay_step(
        run_folder(run),
        step,
        overrides=set_ or (),
        max_steps=max_steps,
        nearest=from_checkpoint_only,
        reporter=Reporter(),
    )
    _show(result)
    print(f"written: {file}")


def _show(result: dict[str, Any]) -> None:
    """Print the sequences, worst first, then the gradient norms and how the loss compares with the log."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    losses = result["losses"]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("sequence", *losses):
        table.add_column(column, no_wrap=True)
    table.add_column("documents", overflow="fold")
    table.add_column("beginning")
    worst_first = sorted(result["sequences"], key=lambda entry: (entry["loss"] is not None, -(entry["loss"] or 0.0)))
    for entry in worst_first:
        documents = ", ".join(f"{document['id']} ({document['source']})" for document in entry["documents"])
        beginning = " ".join(entry["text"].split())[:_SHOWN_CHARS]
        figures = (str(entry["number"]), *(_number(entry[name]) for name in losses))
        table.add_row(*figures, Text(documents), Text(beginning))
    console.print(table)
    groups = list(result["gradient_norms"].items())[:_SHOWN_GROUPS]
    print("largest gradient norms: " + " · ".join(f"{name} {_number(norm)}" for name, norm in groups))
    weights = "" if result["of_this_step"] else f" on the weights of step {result['weights_of_step']}"
    print(
        f"step {result['step']}{weights}: loss {_number(result['loss'])}, gradient norm {_number(result['grad_norm'])}"
    )
    if result["logged_loss"] is None:
        print("the log has no finite loss of this step to compare with")
    else:
        same = "the same bits" if result["same_bits"] else "not the same bits"
        logged = f"loss {_number(result['logged_loss'])}, gradient norm {_number(result['logged_grad_norm'])}"
        print(f"logged: {logged}; {same}")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
