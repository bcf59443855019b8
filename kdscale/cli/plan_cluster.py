"""`kdscale plan-cluster`: ZeRO stage, teacher placement and batch for a cluster, with memory, speed and days."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdscale.cli.arguments import ConfigArgument, SetOption
from kdscale.errors import ConfigError
from kdscale.sizing.gpus import known_gpus

if TYPE_CHECKING:
    from kdscale.jobs.cluster_plan import ClusterPlan
    from kdscale.sizing.compare import ComparedSetting
    from kdscale.sizing.gpus import Gpu

_SHOWN, _SERVED, _REJECTED = 6, 2, 4  # settings shown: that fit, that fit with a served teacher, that do not fit
_ASSUMED = "Assumptions"


def _option(
    name: str, text: str, metavar: str | None = None, panel: str | None = None, at_least: float | None = None,
    at_most: float | None = None,
) -> object:  # fmt: skip
    return typer.Option(name, help=text, metavar=metavar, rich_help_panel=panel, min=at_least, max=at_most)


def plan_cluster_command(
    config: ConfigArgument,
    set_: SetOption = None,
    nodes: Annotated[int, _option("--nodes", "Number of nodes.", at_least=1, at_most=65_536)] = 1,
    gpus_per_node: Annotated[
        int, _option("--gpus-per-node", "GPUs (and ranks) per node.", at_least=1, at_most=65_536)] = 8,
    gpu: Annotated[str, _option("--gpu", f"One of {', '.join(known_gpus())}.", "NAME")] = "h100",
    gpu_memory: Annotated[str | None, _option("--gpu-memory", "Memory of a GPU, e.g. 80GiB.", "SIZE")] = None,
    host_memory: Annotated[str, _option("--host-memory", "Memory of a node.", "SIZE")] = "1TiB",
    tokens: Annotated[str | None, _option("--tokens", "Tokens to train on. Default: distill.tokens.", "N")] = None,
    document_tokens: Annotated[
        str | None, _option("--document-tokens", "Tokens of a document of the text. Default: one a row.", "N")
    ] = None,
    stage: Annotated[
        list[int] | None, _option("--stage", "Compare this ZeRO stage only. Repeatable.", at_least=1, at_most=3)
    ] = None,
    teacher: Annotated[
        list[str] | None, _option("--teacher", "Compare this teacher_placement only. Repeatable.", "PLACEMENT")
    ] = None,
    flops: Annotated[float | None, _option("--flops", "bf16 FLOP/s of a GPU.", None, _ASSUMED, 1.0, 1e18)] = None,
    bandwidth: Annotated[
        float | None,
        _option("--bandwidth", "Bytes/s between nodes, per GPU and one way.", None, _ASSUMED, 1.0, 1e18)] = None,
    compute_share: Annotated[
        float, _option("--compute-share", "Share of the FLOP/s that computing reaches.", None, _ASSUMED, 0.01, 1.0)
    ] = 0.40,
    link_share: Annotated[
        float, _option("--link-share", "Share of the bandwidth that links reach.", None, _ASSUMED, 0.01, 1.0)] = 0.70,
    everything: Annotated[bool, _option("--all", "Show every setting that was compared.")] = False,
    json_: Annotated[bool, _option("--json", "Print JSON instead of tables.")] = False,
    write: Annotated[Path | None, _option("--write", "Write the YAML lines to a file.", "FILE")] = None,
) -> None:  # fmt: skip
    """Find the ZeRO stage, teacher placement and micro-batch for a cluster, from shapes alone; starts nothing.

    Memory, tokens per second and days are estimates (docs/explanation/memory-and-speed.md). Exit code 2: nothing fits.
    """
    from kdscale.config.load import find_config, load_config
    from kdscale.files import write_text
    from kdscale.jobs.cluster_plan import plan_cluster, snippet, to_json
    from kdscale.sizing.gpus import GpuCluster, find_gpu
    from kdscale.sizing.speed import Rates
    from kdscale.weights import resolve_teacher

    loaded = load_config(find_config(config), set_ or [])
    budget, document = _count("--tokens", tokens), _count("--document-tokens", document_tokens)
    cluster = GpuCluster(
        _gpu(find_gpu(gpu), gpu_memory, flops, bandwidth), nodes, gpus_per_node, _bytes("--host-memory", host_memory)
    )
    chosen: Any = {
        "stages": stage or (1, 2, 3),
        "placements": teacher or None,
        "tokens": budget,
        "document_tokens": document,
    }
    source = resolve_teacher(loaded.teacher, config_only=True)
    plan = plan_cluster(loaded, source, cluster, Rates(compute_share, link_share), **chosen)
    if json_:
        import json

        typer.echo(json.dumps(to_json(plan), indent=2))
    else:
        _show(plan, everything)
    lines = snippet(plan)  # raises when nothing fits
    if write is not None:
        write_text(write, lines)
    if not json_:
        typer.echo(lines, nl=False)


def _gpu(listed: Gpu, memory: str | None, flops: float | None, bandwidth: float | None) -> Gpu:
    """The listed GPU with what the options replace. Raises ConfigError for a size that is not one."""
    return replace(
        listed,
        memory=_bytes("--gpu-memory", memory) if memory else listed.memory,
        flops=flops or listed.flops,
        network=bandwidth or listed.network,
    )


def _count(option: str, text: str | None) -> int | None:
    """The count that an option gives; None without it. Raises ConfigError."""
    from kdscale.units import parse_count

    count = parse_count(text) if text else None
    if text and not (isinstance(count, int) and count > 0):
        raise ConfigError(option, expected="a count such as 10B", got=text)
    return count


def _bytes(option: str, text: str) -> float:
    """The size that an option gives. Raises ConfigError."""
    from kdscale.units import parse_budget

    try:
        unit, value = parse_budget(text, "bytes")
    except ValueError as error:
        raise ConfigError(option, expected="a size such as 80GiB", got=repr(text)) from error
    if unit == "fraction" or value <= 0:
        raise ConfigError(option, expected="a size such as 80GiB", got=repr(text))
    return value


def _show(plan: ClusterPlan, everything: bool) -> None:
    """Print the compared settings, and where the chosen one's memory and time go."""
    from rich.console import Console

    from kdscale.cli.tables import table
    from kdscale.sizing.gpus import GIB
    from kdscale.units import compact_count

    console, cluster, job = Console(), plan.cluster, plan.job
    console.print(
        f"teacher {compact_count(job.teacher_params)}, student {compact_count(job.student.params)} "
        f"({plan.student_from}), {plan.global_batch} sequences per step of {job.seq_len} positions in documents of "
        f"{job.row[0]}\n"
        f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}, {cluster.gpu.memory / GIB:.1f} GiB · "
        f"assumed: {plan.rates.compute:.0%} of "
        f"{cluster.gpu.flops / 1e12:.0f} TFLOP/s, {plan.rates.links:.0%} of links",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    columns = ("stage", "teacher", "saves by", "batch", "GiB", "tok/s", "MFU", "time", "")
    shown = _selected(plan, everything)
    rows = [_row(compared, plan) for compared in shown]
    console.print(table(f"{len(plan.settings)} settings compared", columns, rows, nowrap=True))
    for line in _legend(shown, plan):
        console.print(line, style="dim", highlight=False)
    chosen = plan.chosen
    if chosen is None:
        return
    memory = chosen.memory
    sizes = [*sorted(memory.parts.items(), key=lambda item: -item[1]), ("sum", memory.total)]
    sizes += [("host memory per node", memory.host * cluster.gpus_per_node)] if memory.host else []
    in_gib = [(name, f"{size / GIB:.2f}") for name, size in sizes]
    console.print(table("", (f"GiB per GPU at the fullest moment ({memory.moment})", ""), in_gib, right_from=1))
    speed = chosen.speed
    phases = {**{name: value for name, value in speed.seconds.items() if value}, "sum": speed.step}
    seconds = [(name, f"{value:.3g}") for name, value in phases.items()]
    console.print(table("", ("Seconds per step", ""), seconds, right_from=1))


def _selected(plan: ClusterPlan, everything: bool) -> list[ComparedSetting]:
    """The settings to show: all of them, or the best of those that fit and a few that do not."""
    if everything:
        return plan.settings
    served = [compared for compared in plan.settings if compared.fits and compared.setting.placement == "served"]
    fit = [compared for compared in plan.settings if compared.fits and compared not in served]
    rest = [compared for compared in plan.settings if not compared.fits]
    return fit[:_SHOWN] + served[:_SERVED] + rest[: _REJECTED if fit else _SHOWN]


def _row(compared: ComparedSetting, plan: ClusterPlan) -> tuple[str, ...]:
    from kdscale.sizing.gpus import GIB
    from kdscale.units import compact_count, compact_duration

    setting = compared.setting
    saves = [setting.recompute.short] if setting.recompute.checkpoints else []
    saves += ["both"] if setting.offload_parameters else ["Adam"] if setting.offload_optimizer else []
    stage = f"{setting.stage} hpZ" if setting.hpz > 1 else str(setting.stage)
    if setting.kept:
        stage += " K" if setting.kept == plan.job.student.params else " K/2"
    stage += f" T={setting.tensor}" if setting.tensor > 1 else ""
    stage += f" S={setting.sequence}" if setting.sequence > 1 else ""
    teacher = setting.placement + (" ahead" if setting.overlap else "")
    verdict = "chosen" if compared is plan.chosen else compared.verdict
    return (
        stage, teacher, " ".join(saves), f"{setting.micro_batch}×{setting.accumulation}",
        f"{compared.memory.total / GIB:.1f}", compact_count(compared.speed.tokens_per_second),
        f"{compared.speed.mfu:.0%}", compact_duration(compared.seconds(plan.tokens)), verdict,
    )  # fmt: skip


def _legend(shown: list[ComparedSetting], plan: ClusterPlan) -> list[str]:
    """What the short words of the table stand for, as far as it has them."""
    from kdscale.config.distill.recompute import RECOMPUTE
    from kdscale.sizing.gpus import GIB

    settings = [compared.setting for compared in shown]
    levels = {setting.recompute for setting in settings if setting.recompute.checkpoints}
    verdicts = {compared.verdict: compared for compared in reversed(shown)}
    lines = {
        "batch: sequences a forward × forwards a step, on a rank": True,
        **{f"{level.short}: gradient_checkpointing: {level.name}": level in levels for level in RECOMPUTE.values()},
        "Adam: its state in host memory": any(setting.offload_optimizer for setting in settings),
        "both: the weights too": any(setting.offload_parameters for setting in settings),
        "hpZ: all weights in each node too": any(setting.hpz > 1 for setting in settings),
        "K, K/2: all or half of the weights stay gathered over a step": any(setting.kept for setting in settings),
        "ahead: the teacher's next forward beside the backward": any(setting.overlap for setting in settings),
        "T, S: ranks that share layers, sequences": any(setting.tensor * setting.sequence > 1 for setting in settings),
        f"too large: for the GPU's {plan.cluster.gpu.memory / GIB:.1f} GiB": "too large" in verdicts,
    }
    lines |= {f"{name}: {verdicts[name].reason}": True for name in ("own GPUs", "host full") if name in verdicts}
    return [line for line, wanted in lines.items() if wanted]
