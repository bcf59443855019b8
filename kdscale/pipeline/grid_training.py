"""Quantisation-aware distillation (arXiv 2601.20088): the student is trained on, on the grid of the form that it gets.

A distillation run inside the run, in `work/quantize/`, whose pruned model is the distilled student, or what GPTQ makes
of it: the same teacher, objectives, trainer, ranks, checkpoints and resuming. Its weights are rounded once more when
the form is written, to where the last forward had them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kdscale.config.quantize import Int4Config
from kdscale.config.root import Config
from kdscale.files import atomic_path
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import IMPORTANCE, PLAN, TARGETS, WEIGHTS, RunFolder, training_metrics
from kdscale.teacher.folders import teacher_folders


def trained_forms(config: Config) -> tuple[Int4Config, ...]:
    """The forms of a run that the student is trained on for."""
    return config.quantize.trained if config.quantize is not None else ()


def what_trains(config: Config) -> str:
    """The config field that makes the stage train; "" where it does not."""
    return "quantize.forms (method: distilled)" if trained_forms(config) else ""


def trained_student(config: Config, form: Int4Config) -> Path:
    """Where the student is when it has been trained on for a form."""
    return RunFolder(Path(config.training_on_grid(form).run_dir)).student


def start_of_training(run: RunFolder, form: Int4Config) -> Path:
    """The student that a form's training begins with; from GPTQ, the stage writes it before."""
    return run.work / "quantize" / f"start-{form.label}" if form.starts_from_gptq else run.student


def what_trainings_depend_on(context: StageContext) -> Facts:
    """The settings of each training that its weights depend on, and the weights of its teachers; none without."""
    forms = trained_forms(context.config)
    if not forms:
        return {}
    teachers = teacher_folders(context.config, context.model_to_learn_from)
    return {
        "distill": {form.label: context.config.training_on_grid(form).decisive_for_student() for form in forms},
        "teachers": {name: digest_tree(folder, WEIGHTS) for name, folder in teachers.items()},
    }


def train_on_grid(context: StageContext, form: Int4Config) -> RunFolder:
    """Train to the end or raise; returns the run inside the run, whose student's weights are to be rounded."""
    assert context.run_inner is not None
    run, config = context.run, context.config.training_on_grid(form)
    shared = {**context.shared_text(), "pruned": start_of_training(run, form)}
    # what objectives that match layers know of the pruning, and stored targets, where there are any
    shared |= {artifact.path: run.at(artifact) for artifact in (PLAN, IMPORTANCE, TARGETS) if run.at(artifact).exists()}
    context.reporter.say(f"  {form.label}: the student is trained on for {config.distill.tokens:,} tokens")
    context.run_inner(context, config, ("distill",), shared)
    inner = RunFolder(Path(config.run_dir))
    with atomic_path(run.at(training_metrics(form.label))) as tmp:
        shutil.copyfile(inner.metrics, tmp)
    return inner
