"""The prune stage: write the pruned student and check it against the masked teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.errors import SelfCheckError
from kdscale.files import read_json, remove_tree, replace_dir, write_json
from kdscale.models.loading import open_teacher
from kdscale.pipeline.spawn import join_calibration, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext

if TYPE_CHECKING:
    from torch import Tensor

_CHECK_ROWS, _CHECK_TOKENS = 2, 96
_STUDENT_BYTES = 4  # a parameter of the student on disk, at most

SELF_CHECK_FILE = "self_check.json"


def disk_bytes(context: StageContext, student_params: int) -> int:
    """The pruned student."""
    return student_params * _STUDENT_BYTES


def copied_from_and_to(context: StageContext) -> tuple[Path, Path]:
    """Tokenizer, licence and the like come from the model that is pruned."""
    return context.model_to_prune, context.run.pruned


def prune_and_check(context: StageContext) -> Facts:
    """Write the pruned student on as many processes as the config asks for, and check it."""
    run_on_ranks("prune", prune_rank, context, ranks_of(context.config, "importance.processes"))
    figures = read_json(context.run.logs / SELF_CHECK_FILE)
    return {"self-check": f"passed, largest relative difference {max(figures.values()):.1e}"}


def prune_rank(context: StageContext) -> None:
    """Prune as one rank; the first rank writes the student, checks it and gives it its name."""
    from kdscale.prune.apply import apply_plan
    from kdscale.prune.compensation.recovered_error import RecoveredErrors
    from kdscale.prune.plan import Plan
    from kdscale.prune.rotation import rotated_teacher
    from kdscale.prune.self_check import self_check
    from kdscale.prune.stream_cut import METHOD as REFIT
    from kdscale.prune.stream_cut import StreamBasis
    from kdscale.runs.importance_scores import load_scores
    from kdscale.runtime.device import resolve_dtype
    from kdscale.runtime.ranks import is_writer

    config, run = context.config, context.run
    share = join_calibration(context, "prune")
    teacher, family = open_teacher(context.model_to_prune)
    basis, cut = None, Plan.load(run.plan)
    if cut.methods.hidden == "pca":
        teacher = rotated_teacher(teacher, family, load_scores(run.importance))
    elif cut.methods.hidden == REFIT:
        basis = StreamBasis.of(load_scores(run.importance), cut.student.hidden)
    plan = Plan.load(run.plan, config=teacher.config, family=family)
    recovered = None
    if is_writer():
        recovered = RecoveredErrors(run.repair)
        recovered.keep_layers(plan.kept.layers if plan.methods.compensate != "none" else [])
    student = run.work / "prune" / "student"  # becomes run.pruned when it has passed the check
    apply_plan(
        teacher,
        family,
        plan,
        student,
        config.prune,
        batches=share.batches,
        dtype=resolve_dtype(config.importance.dtype, share.device),
        device=share.device,
        reporter=context.reporter,
        scratch=share.scratch,
        recovered=recovered,
        code=config.teacher.trust_remote_code,
        basis=basis,
    )
    if not is_writer():
        return
    try:
        figures = self_check(teacher, family, plan, student, _check_ids(run.data, config.seed), device=share.device)
    except SelfCheckError:
        remove_tree(run.work / "prune")  # nothing of it is to be taken up again
        teacher.check_finite()  # a weight that is no number equals nothing, not even itself
        raise
    write_json(run.logs / SELF_CHECK_FILE, figures)
    replace_dir(student, run.pruned)


def _check_ids(data: Path, seed: int) -> Tensor:
    """A few rows of held-out text for the self-check, as whole documents without padding."""
    from kdscale.data.heldout import eval_batches
    from kdscale.data.token_store import TokenStore

    heldout = TokenStore.open(data).split("heldout")
    (batch, *_) = eval_batches(heldout, _CHECK_TOKENS, _CHECK_ROWS, _CHECK_ROWS * _CHECK_TOKENS, seed)
    return batch.input_ids_BS
