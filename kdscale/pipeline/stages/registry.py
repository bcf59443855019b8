"""All stages of a run, in order: one row each.

The commands, `--until`, status, steps, ranks, the disk check and the report's order all come from this table. A new
stage is a row here and one file beside this one (and a section of the config, if it has settings).
"""

from __future__ import annotations

from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.pipeline import grid_training
from kdscale.pipeline.stage import Stage, belongs_to
from kdscale.pipeline.stages import (
    bias,
    data,
    distill,
    downstream,
    evaluate,
    importance,
    plan,
    prune,
    quantize,
    report,
    responses,
    targets,
)  # fmt: skip
from kdscale.pipeline.stages.teachers import correct, merge
from kdscale.runs import folder
from kdscale.runs.models import MODEL_WEIGHTS

_CODE = "teacher.trust_remote_code"

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="merge", title="merge the adapters into the teacher",
            help="Merge the adapters that the config names beside the teacher into its weights.",
            run=merge.merge, config=(_CODE, "prune.max_shard_bytes"), depends_on=merge.what_matters,
            model="teacher_folder", copies=merge.copied_from_and_to, writes=(folder.MERGED,), resumable=True,
            disk_bytes=merge.disk_bytes, only_with="teacher.adapters", check_before=merge.check_before,
        ),
        Stage(
            name="responses", title="have the teacher answer prompts",
            help="Have the teacher answer prompts, for the student to learn from; nothing is asked twice.",
            run=responses.answer_prompts, run_rank=responses.answer_rank, processes="responses.processes",
            depends_on=responses.what_matters, writes=(folder.RESPONSES,), only_with="responses",
            check_before=responses.check_before,
            memory=("responses.micro_batch",),
        ),
        Stage(
            name="data", title="tokenise the text", run=data.tokenize,
            config=(
                "data.sources", "data.heldout_fraction", "data.heldout_sources", "data.max_document_tokens",
                "data.add_special", "data.chat_template", "data.deduplicate", "data.blend",
                "data.leaks", "data.leak_tokens", "data.leak_sources",
            ),
            depends_on=data.what_it_depends_on, model="teacher", model_files=("config.json", *folder.TOKENIZER),
            reads=(folder.KEPT_RESPONSES,), writes=(folder.DATA,), check_after=data.check_text,
            memory=("data.processes",),
        ),
        Stage(
            name="correct", title="correct the teacher",
            help="Fine-tune the teacher on the run's text, where the config has a section correct.",
            run=correct.correct_teacher, processes="distill.processes", config=("seed", _CODE),
            depends_on=correct.what_it_depends_on, model="teacher", copies=correct.copied_from_and_to,
            reads=(folder.DATA,), writes=(folder.CORRECTED,), resumable=True, disk_bytes=correct.disk_bytes,
            only_with="correct", distils_by_itself=lambda config: "correct", watches_itself=True,
            check_before=distill.check_before,
            memory=("distill.micro_batch", "distill.gradient_checkpointing", "distill.zero_stage"),
        ),
        Stage(
            name="student", title="take the ready student",
            help="Take the ready student, where the config has a section student.",
            run=prune.take_ready_student, only_with="student",
            config=(_CODE,), depends_on=prune.ready_student_matters, copies=prune.ready_student_copies,
            writes=(folder.PRUNED,), disk_bytes=prune.ready_student_bytes, check_before=prune.check_ready_student,
        ),
        Stage(
            name="importance", title="measure importance",
            not_with="student", help="Measure what each part of the teacher contributes.",
            run=importance.measure_importance, run_rank=importance.importance_rank, processes="importance.processes",
            config=("importance", "seed", _CODE), depends_on=importance.axes_to_score, model="model_to_prune",
            reads=(folder.DATA,), writes=(folder.IMPORTANCE,), resumable=True, in_steps=True,
            memory=("importance.micro_batch", "importance.calibration_tokens", "importance.processes"),
        ),
        Stage(
            name="plan", title="choose the student's shape", run=plan.choose_plan, run_rank=plan.plan_rank,
            not_with="student", config=("prune",), depends_on=plan.what_matters,
            distils_by_itself=plan.distils_by_itself,
            model="model_to_prune", check_before=plan.check_before,
            reads=(folder.IMPORTANCE,), writes=(folder.PLAN,), hand_editable=True, in_steps=True,
            memory=("importance.micro_batch", "prune.search.masked_tokens", "prune.search.task_items"),
        ),
        Stage(
            name="prune", title="prune and check", not_with="student",
            help="Write the pruned student (and whatever it still needs) and check it.",
            run=prune.prune_and_check, run_rank=prune.prune_rank, processes="importance.processes",
            config=("prune", "importance", "seed", _CODE), model="model_to_prune",
            copies=prune.copied_from_and_to,
            reads=(folder.PLAN, folder.IMPORTANCE, folder.DATA), writes=(folder.PRUNED, folder.REPAIR),
            disk_bytes=prune.disk_bytes, resumable=True, in_steps=True,
            memory=("importance.micro_batch", "importance.layer_tokens", "importance.processes"),
        ),
        Stage(
            name="targets", title="store the teacher's targets",
            help="Compute the teacher's targets once, into a store that any number of students read.",
            run=targets.write_targets, run_rank=targets.targets_rank, processes="targets.processes",
            config=("seed", _CODE), depends_on=targets.what_matters, model="model_to_learn_from",
            reads=(folder.DATA,), writes=(folder.TARGETS,), resumes_from=(folder.TARGETS,),
            disk_bytes=targets.disk_bytes, disk_folder=targets.disk_folder, only_with="targets", in_steps=True,
            memory=("targets.micro_batch", "targets.teacher_placement"),
        ),
        Stage(
            name="distill", title="distil the teacher into the student",
            help="Distil the teacher into the pruned student; resumes where it was.",
            run=distill.distill, run_rank=distill.distill_rank, processes="distill.processes",
            config=("seed", _CODE), depends_on=distill.what_distillation_depends_on, model="model_to_learn_from",
            copies=distill.copied_from_and_to,
            reads=(folder.PRUNED_WEIGHTS, folder.DATA, folder.TARGETS_HEADER, folder.KEPT_RESPONSES),
            writes=(folder.STUDENT, folder.ADAPTER),
            resumes_from=(
                folder.CHECKPOINTS, folder.ON_POLICY, folder.METRICS, folder.BAD_BATCHES, folder.TENSORBOARD
            ),
            disk_bytes=distill.disk_bytes, in_steps=True, across_job=True, watches_itself=True,
            check_before=distill.check_before,
            memory=(
                "distill.micro_batch", "distill.gradient_checkpointing", "distill.teacher_placement",
                "distill.zero_stage",
            ),
        ),
        Stage(
            name="quantize", title="quantise the student",
            help="Write the distilled student in forms with fewer bits.",
            run=quantize.quantize, run_rank=quantize.quantize_rank, processes="quantize.processes",
            config=("quantize", "seed", _CODE), depends_on=grid_training.what_trainings_depend_on,
            distils_by_itself=grid_training.what_trains, reads=(folder.STUDENT_WEIGHTS, folder.DATA),
            writes=(folder.QUANTIZED,), disk_bytes=quantize.disk_bytes, resumable=True, only_with="quantize",
            check_before=quantize.check_before,
            memory=("quantize.micro_batch", "quantize.calibration_tokens", "quantize.processes"),
        ),
        Stage(
            name="eval", title="evaluate side by side",
            help="Measure teacher, pruned and distilled side by side on held-out text.",
            run=evaluate.evaluate, run_rank=evaluate.evaluate_rank, processes="eval.processes",
            config=("eval", "seed", _CODE), without=("eval.downstream",),
            model="teacher", model_files=(*folder.WEIGHTS, *folder.TOKENIZER),
            reads=(*MODEL_WEIGHTS, folder.DATA), writes=(folder.EVAL,),
            memory=("eval.micro_batch", "eval.processes"),
        ),
        Stage(
            name="downstream", title="ask the models tasks",
            help="Give all models tasks with right answers, the same items to each (eval.downstream).",
            run=downstream.ask_models, run_rank=downstream.ask_rank, processes="eval.downstream.processes",
            config=("seed", _CODE), depends_on=downstream.what_matters,
            model="teacher", model_files=(*folder.WEIGHTS, *folder.TOKENIZER), reads=MODEL_WEIGHTS,
            writes=(folder.DOWNSTREAM,), resumable=True, disk_bytes=downstream.disk_bytes,
            only_with="eval.downstream", check_before=downstream.check_before,
            memory=("eval.downstream.batch_size", "eval.downstream.processes"),
        ),
        Stage(
            name="bias", title="measure bias and safety",
            help="Measure bias and safety of teacher and students on the same items, and whether they grew.",
            run=bias.measure_bias, run_rank=bias.bias_rank, processes="bias.processes", config=("seed", _CODE),
            depends_on=bias.what_matters, model="teacher", model_files=(*folder.WEIGHTS, *folder.TOKENIZER),
            reads=MODEL_WEIGHTS, writes=(folder.BIAS,), resumable=True, only_with="bias",
            check_before=bias.check_before, gate=bias.gate,
            memory=("bias.micro_batch", "bias.processes"),
        ),
        Stage(
            name="report", title="write the report", run=report.write_report, config=("name",),
            depends_on=report.what_matters,
            reads=(
                folder.PLAN, folder.IMPORTANCE, folder.PRUNED_CONFIG, folder.REPAIR, folder.EVAL, folder.DOWNSTREAM,
                folder.BIAS, folder.METRICS, folder.ON_POLICY,
            ),
            writes=(folder.REPORT, folder.STUDENT_CARD),
        ),
    )
}  # fmt: skip


def stages_of(config: Config) -> list[Stage]:
    """The stages of a run with this config, in order."""
    return [stage for stage in STAGES.values() if belongs_to(stage, config)]


def stages_until(last: str, config: Config) -> list[Stage]:
    """The stages that bring a run up to `last`, in order. Raises ConfigError when the run has no such stage."""
    stages = stages_of(config)
    names = [stage.name for stage in stages]
    if last not in names and not STAGES[last].only_with:
        raise ConfigError(
            f"this run has no stage {last}", expected=f"no {STAGES[last].not_with} in the config", got="one",
            hint=f"the stage {STAGES[last].not_with} takes its place",
        )  # fmt: skip
    if last not in names:
        raise ConfigError(
            f"this run has no stage {last}",
            expected=f"{STAGES[last].only_with} in the config",
            got="none",
            hint=f"add a section {STAGES[last].only_with}, or leave the stage out",
        )
    return stages[: names.index(last) + 1]


def stages_of_steps(config: Config) -> list[Stage]:
    """The stages that each step on the way to the final student runs too, in order."""
    return [stage for stage in stages_of(config) if stage.in_steps]


def job_stage() -> str:
    """The stage whose processes are the ranks of the whole job."""
    return next(name for name, stage in STAGES.items() if stage.across_job)


def last_alone(config: Config) -> Stage:
    """The last stage before all ranks are needed: a job of one node can bring a run up to it."""
    return stages_until(job_stage(), config)[-2]


def job_targets() -> tuple[str, ...]:
    """The stages up to which a job of many ranks can run: the one that needs all ranks, and those after it."""
    names = list(STAGES)
    return tuple(names[names.index(job_stage()) :])
