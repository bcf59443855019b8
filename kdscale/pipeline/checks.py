"""What is checked before any work: the teacher, lengths, text, shapes, what ranks can share, the disk.

Everything that can be known is checked in one pass, and all problems are reported at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.data import RESPONSES_SOURCE
from kdscale.config.root import Config
from kdscale.data.encoders.reading import check_reading
from kdscale.distill.telemetry.trackers import check_trackers
from kdscale.errors import ConfigError, FileError, KdscaleError, RunFolderError, raise_together
from kdscale.models.loading import open_teacher
from kdscale.pipeline.spawn import PLACE_VARIABLE, ranks_of
from kdscale.pipeline.stage import Stage, StageContext, manifest_path
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter

if TYPE_CHECKING:
    from kdscale.prune.plan import Plan

_MARGIN_BYTES = 64 << 20  # logs, reports and what else is small


def check_before_work(
    config: Config, run: RunFolder, stages: Iterable[Stage], reporter: Reporter, of_steps: Iterable[Stage] = ()
) -> tuple[Path, list[Plan]]:
    """Check everything that can be known before `stages` run; returns the teacher's folder and the planned shapes.

    `of_steps`: the stages that each step runs before them. Raises the one error, or one of the first error's class that
    lists them all.
    """
    errors, teacher, plans = find_problems(config, run, stages, reporter, of_steps)
    raise_together(errors)
    assert teacher is not None
    return teacher, plans


def find_problems(
    config: Config, run: RunFolder, stages: Iterable[Stage], reporter: Reporter, of_steps: Iterable[Stage] = (),
    devices: bool = True,
) -> tuple[list[KdscaleError], Path | None, list[Plan]]:  # fmt: skip
    """Everything that is wrong before `stages` run, the teacher's folder (None: there is none), the planned shapes.

    `devices`: also whether this machine has those that the run needs.
    """
    errors: list[KdscaleError] = []
    attempt(errors, check_run_dir, run.path)
    attempt(errors, check_trackers, config.tracking)
    attempt(errors, check_sources, config)
    unfinished = [stage for stage in stages if not manifest_path(stage, run).exists()]
    for stage in unfinished:
        if stage.check_before is not None:
            attempt(errors, stage.check_before, config, run)
    if devices:
        attempt(errors, check_devices, config, unfinished, of_steps)
    if PLACE_VARIABLE in os.environ:
        attempt(errors, check_prepared, config, unfinished)
    teacher: Path | None = attempt(errors, check_teacher, config, reporter)
    plans: list[Plan] = []
    if teacher is not None:
        attempt(errors, check_reading, config, teacher)
        attempt(errors, check_teachers, config, teacher)
        attempt(errors, check_lengths, config, teacher, reporter)
        # an impossible budget is noticed before anything is made
        plans = attempt(errors, plan_shapes, config, teacher) or []
        attempt(errors, check_shared_models, config, teacher, plans)
        attempt(errors, check_forms, config, teacher)
    return errors, teacher, plans


def attempt(errors: list[KdscaleError], check: Callable[..., Any], *arguments: Any) -> Any:
    """What a check returns; None when it fails, and its error joins `errors`."""
    try:
        return check(*arguments)
    except KdscaleError as error:
        errors.append(error)
    except OSError as error:  # of a name in the config: too long, a loop of links, forbidden
        errors.append(FileError(f"{str(error.filename)[:200]} cannot be read", got=error.strerror))
    return None


def check_run_dir(path: Path) -> None:
    """Raises ConfigError when the nearest existing parent of a run folder is a file."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError("run_dir", expected="a folder (new or empty)", got=f"{parent} is a file")


def check_teacher(config: Config, reporter: Reporter | None = None) -> Path:
    """Everything about the teacher that can be known without reading its weights. Returns its folder.

    `reporter`, if there is one, prints what of its tokenizer cannot be used.
    """
    from kdscale.weights import check_tokenizer, resolve_teacher, sidecar_names

    folder = resolve_teacher(config.teacher)
    checkpoint, family = open_teacher(folder)
    fit = check_tokenizer(folder, family.dims(checkpoint.config).vocab)
    if fit.notice and reporter is not None:
        reporter.say(f"  note: {fit.notice}")
    sidecar_names(folder, config.teacher.trust_remote_code)
    return folder


def check_teachers(config: Config, teacher: Path) -> None:
    """Raises ConfigError for a teacher of distill.teachers that is not there, or that has other tokens than the run's
    `teacher`, which its students share, and so cannot teach them; CheckpointError for one that cannot be read."""
    from kdscale.teacher.folders import teacher_folders
    from kdscale.weights import check_tokenizer

    for name, folder in teacher_folders(config, teacher).items():
        if folder == teacher:
            continue
        checkpoint, family = open_teacher(folder)
        check_tokenizer(folder, family.dims(checkpoint.config).vocab)
        if _vocabulary(folder) != _vocabulary(teacher):
            from kdscale.teacher.vocabulary.across import check_across  # it loads torch

            check_across(config.distill, name)


def _vocabulary(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


def check_sources(config: Config) -> None:
    """Raises DataError when a local source of text does not exist or holds no text files."""
    from kdscale.data.sources import is_local, source_files

    for source in config.data.all_sources:
        if is_local(source) and source.path != RESPONSES_SOURCE:  # these have yet to be made
            source_files(source)


def check_devices(config: Config, stages: Iterable[Stage], of_steps: Iterable[Stage] = ()) -> None:
    """Raises ConfigError when a stage, or one `of_steps`, asks for more ranks than this host has GPUs.

    Of a stage that shares a larger job's ranks, each rank checks its own GPU (kdscale.jobs.rank).
    """
    needs: dict[str, int] = {}
    for stage in stages:
        if stage.processes and not (stage.across_job and PLACE_VARIABLE in os.environ):
            needs[stage.processes] = ranks_of(config, stage.processes)
    for index, step in enumerate(config.steps):
        one = config.step(index)
        for stage in of_steps:
            if stage.processes and not manifest_path(stage, RunFolder(Path(one.run_dir))).exists():
                needs[f"{stage.processes} of step {step.name}"] = ranks_of(one, stage.processes)
    if needs:
        from kdscale.runtime.gpu_binding import check_gpus  # it loads torch, which a finished run does without

        check_gpus(config.runtime.device, needs)


def check_prepared(config: Config, stages: Iterable[Stage]) -> None:
    """Raises ConfigError when a job of many ranks would come to a distillation inside the run.

    The other ranks wait for one distillation, the run's own.
    """
    before: list[str] = []
    after: list[str] = []
    fields = before
    for stage in stages:
        if stage.distils_by_itself is not None and (field := stage.distils_by_itself(config)):
            fields.append(field)
        if stage.across_job:
            folders = [RunFolder(Path(config.step(index).run_dir)) for index in range(len(config.steps))]
            fields += ["steps"] if not all(manifest_path(stage, folder).exists() for folder in folders) else []
            fields = after
    if before:
        raise ConfigError(
            ", ".join(before),
            expected="steps, probes and corrections that are done: a job's ranks wait for the run's own distillation",
            hint="kdscale launch --prepare, or `kdscale prune CONFIG` on one host first, and then this job",
        )
    if after:
        raise ConfigError(
            ", ".join(after),
            expected="a job that ends before it: the ranks wait for the run's own distillation alone",
            hint="kdscale launch --until distill, and then `kdscale run CONFIG` on one host",
        )  # fmt: skip


def check_lengths(config: Config, teacher: Path, reporter: Reporter) -> None:
    """Raises ConfigError for lengths beyond the teacher's learned positions, and for prompts without tokens.

    Longer than max_position_embeddings is possible where positions are computed, and reported.
    """
    from tokenizers import Tokenizer

    checkpoint, family = open_teacher(teacher)
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = () if family.is_encoder else config.eval.prompts
    prompts = {prompt: len(tokenizer.encode(prompt).ids) for prompt in texts}
    for prompt in prompts:
        if not tokenizer.encode(prompt, add_special_tokens=False).ids:
            raise ConfigError("eval.prompts", expected="some text to continue", got=f"{prompt!r}, which has no tokens")
    learned = "positions" in family.data.sizes
    limit = family.language(checkpoint.config).get("max_position_embeddings")
    if learned:
        limit = family.fixed_size("positions", checkpoint.config) - family.first_position(checkpoint.config)
    if not isinstance(limit, int):
        return
    lengths = lengths_used(config, max(prompts.values(), default=0), family.is_encoder)
    beyond = ", ".join(f"{name} = {length:,}" for name, length in lengths.items() if length > limit)
    if beyond and learned:
        raise ConfigError("lengths beyond the teacher's positions", expected=f"at most {limit:,} tokens", got=beyond)
    if beyond:
        reporter.say(f"  note: longer than the teacher's max_position_embeddings ({limit:,}): {beyond}")


def lengths_used(config: Config, prompt_tokens: int, encoder: bool = False) -> dict[str, int]:
    """How many positions the stages run a model on, by the fields that decide it."""
    evaluation, search = config.eval, config.prune.search
    lengths = {f"{name}.seq_len": section.seq_len for name, section in config if hasattr(section, "seq_len")}
    for index, step in enumerate(config.steps):
        lengths[f"distill.seq_len of step {step.name}"] = config.step(index).distill.seq_len
    if evaluation.prompts and not encoder:
        lengths["eval.prompts + eval.sample_tokens"] = prompt_tokens + evaluation.sample_tokens
    if (draft := evaluation.draft) is not None:
        most = max(draft.new_tokens, 1 + sum(length + 1 for length in draft.lengths))
        lengths["eval.prompts + eval.draft.new_tokens"] = prompt_tokens + most
    if evaluation.efficiency and not encoder:
        lengths["eval.speed.context_lengths + new_tokens"] = evaluation.speed.longest
    if config.prune.is_timed:
        lengths["prune.search.context_tokens + 1"] = search.context_tokens + 1
    return lengths


def plan_shapes(config: Config, teacher: Path) -> list[Plan]:
    """A plan for each step and the config's own, from the teacher's config.json alone; none of a ready student.

    Ends before the first one whose target is a latency, which has to be measured. Raises ConfigError when a budget
    cannot be met.
    """
    from kdscale.families import load_family
    from kdscale.prune.search.planning import make_plan
    from kdscale.weights import quantised_notice, read_config

    if config.student is not None:
        return []
    model, plans = read_config(teacher), []
    for step in (*(config.step(index) for index in range(len(config.steps))), config):
        if step.prune.is_timed:
            break
        family = load_family(model, str(teacher / "config.json"))
        family = family.keeping_heads(model) if step.prune.keep_mtp else family
        plans.append(make_plan(model, family, None, step.shaping))
        model = family.student_config(model, plans[-1].student.dims(), plans[-1].kept.layers)
    for plan in plans[:1]:  # the one that cuts the teacher
        plan.warnings.extend(filter(None, [quantised_notice(teacher)]))
    return plans


def check_shared_models(config: Config, teacher: Path, plans: Iterable[Plan]) -> None:
    """Raises ConfigError when ranks cannot share the teacher or a planned student as the config says."""
    from kdscale.distill.parallel.checks import (
        check_fake_quantize,
        check_grid_dims,
        check_lora,
        check_sequence_dims,
        check_sequence_parallel,
        check_tensor_dims,
        check_tensor_parallel,
    )
    from kdscale.teacher.folders import teacher_folders

    distill = config.distill
    teachers = {f"teacher {name}".strip(): folder for name, folder in teacher_folders(config, teacher).items()}
    check_tensor_parallel(distill.tensor_parallel, teachers)
    check_sequence_parallel(distill.sequence_parallel, distill.seq_len, teachers)
    if distill.fake_quantize is not None:
        check_fake_quantize({"teacher (and so a student)": teacher})
    if distill.lora is not None and config.student is None:
        check_lora(distill.lora, teacher)
    for plan in plans:
        check_tensor_dims(distill.tensor_parallel, "student", plan.student.dims())
        check_sequence_dims(distill.sequence_parallel, "student", plan.student.dims())
        if distill.fake_quantize is not None:
            check_grid_dims(distill.fake_quantize.group, "student", plan.student.dims())


def check_forms(config: Config, teacher: Path) -> None:
    """Raises ConfigError when the student cannot be quantised; whether groups divide its widths, its plan checks."""
    from kdscale.quantize.matrices import check_family

    if config.quantize is not None:
        check_family(open_teacher(teacher)[1])


def student_parameters(context: StageContext, plans: Sequence[Plan]) -> int:
    """Parameters of the student: from the plan on disk, or from the planned shapes before there is one."""
    from kdscale.prune.plan import Plan

    if context.run.plan.exists():
        return Plan.load(context.run.plan).student_params.total
    if len(plans) == len(context.config.steps) + 1:
        return plans[-1].student_params.total
    from kdscale.teacher.folders import student_folder

    ready = student_folder(context.config) if context.config.student is not None else None
    # under a latency target: no larger than the teacher
    teacher, family = open_teacher(ready or context.pruned_from or context.teacher)
    return family.count_params(teacher.config).total


def check_disk(context: StageContext, stages: Iterable[Stage], student_params: int) -> None:
    """Raises RunFolderError, before any work, when a disk cannot hold what the stages have yet to write to it.

    A stage that is finished needs nothing more; of an unfinished one, what its killed try has written counts.
    """
    run = context.run
    by_disk: dict[int, tuple[Path, dict[str, int]]] = {}
    for stage in stages:
        if stage.disk_bytes is None or manifest_path(stage, run).exists():
            continue
        folder = run.path if stage.disk_folder is None else stage.disk_folder(context)
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        written = [run.at(artifact) for artifact in {*stage.writes, *stage.resumes_from}] + [run.work / stage.name]
        _, needed = by_disk.setdefault(_disk_of(there), (there, {}))
        needed[stage.name] = max(0, stage.disk_bytes(context, student_params) - sum(map(_bytes_under, written)))
    for folder, needed in by_disk.values():
        total, free = sum(needed.values()) + _MARGIN_BYTES, shutil.disk_usage(folder).free
        if total > free:
            listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items())
            raise RunFolderError(
                f"{folder} is on a disk without room",
                expected=f"{total / 1e9:.1f} GB free ({listed})",
                got=f"{free / 1e9:.1f} GB",
                hint="free some space, choose another run_dir or targets.path, lower distill.keep_checkpoints or raise "
                "distill.keep_every",
            )


def _disk_of(path: Path) -> int:
    return path.stat().st_dev


def _bytes_under(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
