"""All stages of a run, in order."""

from __future__ import annotations

from kdscale.pipeline.stage import Stage
from kdscale.pipeline.stages import data, distill, evaluate, importance, plan, prune, report

_CODE = ("teacher.trust_remote_code",)


STAGES: tuple[Stage, ...] = (
    Stage("data", "tokenise the text", ("data",), (), ("data",), data.tokenize, reads_teacher=True),
    Stage(
        "importance", "measure importance", ("importance", "seed", *_CODE), ("data",), ("importance",),
        importance.measure_importance, reads_teacher=True, derived=importance.axes_to_score, resumable=True,
    ),
    Stage(
        "plan", "choose the student's shape", ("prune",), ("importance",), ("plan.json",), plan.choose_plan,
        reads_teacher=True, hand_editable=True, derived=plan.what_matters,
    ),
    Stage(
        "prune", "prune and check", ("prune", "importance", "seed", *_CODE), ("plan.json", "importance", "data"),
        ("pruned",), prune.prune_and_check, reads_teacher=True, resumable=True,
    ),
    Stage(
        "distill", "distil the teacher into the student", ("seed", *_CODE), ("pruned", "data"), ("student",),
        distill.distill, reads_teacher=True, derived=distill.what_distillation_depends_on,
        scratch=("checkpoints", "logs/metrics.jsonl", "logs/bad_batches.jsonl", "logs/tensorboard"),
    ),
    Stage(
        "eval", "evaluate side by side", ("eval", "seed", *_CODE), ("pruned", "student", "data"), ("eval",),
        evaluate.evaluate, reads_teacher=True,
    ),
    Stage(
        "report", "write the report", ("name",),
        ("plan.json", "importance", "pruned/config.json", "repair.json", "eval", "logs/metrics.jsonl"), ("report",),
        report.write_report,
    ),
)  # fmt: skip


STAGE_NAMES = tuple(stage.name for stage in STAGES)
