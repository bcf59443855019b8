"""Tokenised text out: a run's token store as a data set of Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kdscale.cli.arguments import RunArgument, run_folder


def export_megatron_command(
    run: RunArgument,
    prefix: Annotated[Path, typer.Argument(help="PREFIX.bin and PREFIX.idx are written; neither may exist.")],
    split: Annotated[Literal["train", "heldout"], typer.Option(help="Which part of the text.")] = "train",
) -> None:
    """Write a run's tokenised text as Megatron's indexed data set: every document once, with what ends it."""
    from kdscale.data.readers import megatron
    from kdscale.data.token_store import TokenStore
    from kdscale.runs.folder import RunFolder
    from kdscale.runtime.progress import Reporter

    store, reporter = TokenStore.open(RunFolder(run_folder(run)).data), Reporter()
    text = store.split(split)
    for path in megatron.write(prefix, text.tokens_T, text.lengths, store.manifest["vocab_size"]):
        reporter.say(f"wrote {path}")
    reporter.say(f"{text.documents:,} documents, {text.tokens:,} tokens")
    if text.prefix_ids:
        reporter.say(f"  note: what begins a document here, ids {list(text.prefix_ids)}, is not in the files")
    if text.loss_bits is not None:
        reporter.say("  note: which tokens are answers is not in the files: Megatron learns all of them")
