"""The stage downstream: tasks with right answers, given to every model of the run, and to kept checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.evaluation.downstream import DownstreamConfig
from kdscale.config.root import Config
from kdscale.files import atomic_dir, read_json, remove_tree, sha256_json, write_json
from kdscale.pipeline.spawn import join_ranks, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.folder import DOWNSTREAM, DOWNSTREAM_FILE, RunFolder
from kdscale.runs.models import DISTILLED, models_of_run

if TYPE_CHECKING:
    from kdscale.eval.downstream.harness import ScoreSettings
    from kdscale.eval.downstream.measure import Bench

NAME = "downstream"


def what_matters(context: StageContext) -> Facts:
    """The settings that scores depend on, and the files of local tasks."""
    from kdscale.eval.downstream.local_tasks import local_files
    from kdscale.runs.digests import digest_file

    settings = _settings(context.config)
    files = {name: digest_file(file) for name, file in local_files(settings.tasks).items()}
    return {NAME: settings.decisive(), "dtype": context.config.eval.dtype, "task_files": sha256_json(files)[:12]}


def check_before(config: Config, run: RunFolder) -> None:
    """Raises ConfigError without the harness and for what is no task, DataError for data that cannot be had."""
    from kdscale.eval.downstream.harness import prepare

    del run
    prepare(_settings(config).tasks, score_settings(config))


def disk_bytes(context: StageContext, student_params: int) -> int:
    """One checkpoint as a model, at most in fp32, where checkpoints are asked too."""
    return 4 * student_params if _settings(context.config).checkpoints else 0


def ask_models(context: StageContext) -> Facts:
    """Have all models answer; returns their means over the tasks."""
    from kdscale.eval.downstream.measure import headline

    run_on_ranks(NAME, ask_rank, context, ranks_of(context.config, "eval.downstream.processes"))
    return headline(read_json(context.run.at(DOWNSTREAM) / DOWNSTREAM_FILE))


def ask_rank(context: StageContext) -> None:
    """Answer this rank's share of the questions; the first rank writes the figures of all."""
    from kdscale.eval.downstream import measure
    from kdscale.eval.downstream.harness import prepare
    from kdscale.runtime.device import resolve_dtype
    from kdscale.runtime.ranks import is_writer

    run, config = context.run, context.config
    device = join_ranks(context)
    settings = score_settings(config)
    bench = measure.Bench(
        prepare(_settings(config).tasks, settings), settings, device, resolve_dtype(config.eval.dtype, device),
        config.teacher.trust_remote_code, run.work / NAME, context.reporter,
    )  # fmt: skip
    folders = models_of_run(run, config, context.teacher)
    scores = {name: bench.scores(name, folder) for name, folder in folders.items()}
    curve = _checkpoints(context, bench, scores[DISTILLED]) if _settings(config).checkpoints else None
    if not is_writer():
        return
    result = measure.summary(scores, config.seed)
    for name, folder in folders.items():
        result["models"][name] = {"path": str(folder), **result["models"][name]}
    with atomic_dir(run.at(DOWNSTREAM)) as tmp:
        for name, of_model in scores.items():
            write_json(tmp / "items" / f"{name}.json", [measure.to_json(task) for task in of_model.values()])
        write_json(
            tmp / DOWNSTREAM_FILE,
            {"schema_version": measure.SCHEMA_VERSION, "settings": _describe(config, bench), **result, "curve": curve},
        )


def score_settings(config: Config) -> ScoreSettings:
    """How the harness asks, by the config."""
    from kdscale.eval.downstream.harness import ScoreSettings

    settings = _settings(config)
    return ScoreSettings(settings.limit, settings.batch_size, settings.num_fewshot, config.seed)


def _checkpoints(context: StageContext, bench: Bench, last: Any) -> list[dict[str, Any]]:
    """Means of every kept checkpoint by training tokens; the last one is the student, whose scores are known."""
    from kdscale.distill.checkpoint.folder import sealed_checkpoints, step_of
    from kdscale.eval.downstream.measure import means
    from kdscale.runtime.ranks import on_main

    distill = context.config.distill
    steps = on_main(lambda: sorted(step_of(path) for path in sealed_checkpoints(context.run.checkpoints)))
    curve = []
    for step in steps:
        name = f"step-{step}"
        if step == steps[-1]:
            scores = last
        elif bench.has(name):
            scores = bench.scores(name, Path())
        else:
            with _exported(context, step) as folder:
                scores = bench.scores(name, folder)
        curve.append({"step": step, "tokens": step * distill.global_batch * distill.seq_len, **means(scores)})
    return curve


@contextmanager
def _exported(context: StageContext, step: int) -> Iterator[Path]:
    """A checkpoint as a standard model, in a folder that goes with the block. A collective call."""
    from kdscale.distill.export import export_run
    from kdscale.runtime.progress import Reporter
    from kdscale.runtime.ranks import barrier, is_writer, on_main

    folder = context.run.work / NAME / "checkpoint"

    def export() -> None:
        remove_tree(folder)  # of a killed try
        export_run(context.run.path, step, folder, Reporter(quiet=True))

    on_main(export)
    yield folder
    barrier()
    if is_writer():
        remove_tree(folder)


def _describe(config: Config, bench: Bench) -> dict[str, Any]:
    from importlib.metadata import version

    from kdscale.runtime.device import device_name

    return {
        **_settings(config).decisive(), "seed": config.seed, "dtype": str(bench.dtype).removeprefix("torch."),
        "device": bench.device.type, "device_name": device_name(bench.device.type), "lm_eval": version("lm_eval"),
    }  # fmt: skip


def _settings(config: Config) -> DownstreamConfig:
    assert config.eval.downstream is not None, "a run without the section has no such stage"
    return config.eval.downstream
