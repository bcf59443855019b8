"""The student before it learns: pruned and checked against the masked teacher, or a ready model in its place.

A ready student has the teacher's tokens, and may be of any architecture; heads may differ in their padding, which then
gets no probability.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config.root import Config
from kdscale.errors import CheckpointError, SelfCheckError
from kdscale.files import atomic_dir, explain_os_errors, read_json, remove_tree, replace_dir, write_json
from kdscale.models.loading import load_tokenizer, open_teacher
from kdscale.pipeline.spawn import join_calibration, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import WEIGHTS, RunFolder
from kdscale.units import format_count

if TYPE_CHECKING:
    from torch import Tensor

_CHECK_ROWS, _CHECK_TOKENS = 2, 96
_STUDENT_BYTES = 4  # a parameter of the student on disk, at most

SELF_CHECK_FILE = "self_check.json"


def disk_bytes(context: StageContext, student_params: int) -> int:
    """The pruned student, and what goes along with it."""
    return student_params * _STUDENT_BYTES + carried_bytes(context)


def carried_bytes(context: StageContext) -> int:
    """Bytes of what a student has beside its language model, copied from the model that it is made from.

    Only models of several modalities have such parts, and those whose heads are kept.
    """
    from kdscale.families import nested_data
    from kdscale.models.loading import open_teacher
    from kdscale.teacher.folders import student_folder
    from kdscale.weights import read_config

    config = context.config
    folder = context.model_to_prune if config.student is None else student_folder(config)
    single = not (folder / "config.json").exists() or nested_data(read_config(folder)) is None
    if single and not config.prune.keep_mtp:
        return 0
    return open_teacher(folder, keep_heads=config.prune.keep_mtp)[0].carried_nbytes


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
    teacher, family = open_teacher(context.model_to_prune, keep_heads=config.prune.keep_mtp)
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


def ready_student_matters(context: StageContext) -> Facts:
    """The student's weights."""
    from kdscale.teacher.folders import student_folder

    return {"student": digest_tree(student_folder(context.config), WEIGHTS)}


def ready_student_bytes(context: StageContext, student_params: int) -> int:
    """A copy of its files."""
    from kdscale.teacher.folders import student_folder

    del student_params
    return sum(file.stat().st_size for file in student_folder(context.config).glob("*.safetensors"))


def ready_student_copies(context: StageContext) -> tuple[Path, Path]:
    """Tokenizer, licence and the like come from the student's own folder."""
    from kdscale.teacher.folders import student_folder

    return student_folder(context.config), context.run.pruned


def check_ready_student(config: Config, run: RunFolder) -> None:
    """Raises ConfigError for a student that is not there or that ranks cannot share as the config says, CheckpointError
    for one that cannot be trained, or that has other tokens than the teacher."""
    from kdscale.distill.parallel.checks import (
        check_fake_quantize,
        check_lora,
        check_sequence_parallel,
        check_tensor_parallel,
    )
    from kdscale.teacher.folders import student_folder
    from kdscale.weights import check_tokenizer, resolve_teacher

    del run
    folder, distill = student_folder(config), config.distill
    checkpoint, family = open_teacher(folder)
    check_tokenizer(folder, family.dims(checkpoint.config).vocab)
    trust = config.teacher.trust_remote_code
    own, teachers = (load_tokenizer(path, trust).get_vocab() for path in (folder, resolve_teacher(config.teacher)))
    if own != teachers:
        raise CheckpointError(
            f"student.path: tokenizer of {folder}", expected="the vocabulary of teacher.path", got="another one",
            hint="name a model with the student's tokens as teacher.path (the student itself will do), and the other "
            "one in distill.teachers",
        )  # fmt: skip
    for check in (
        partial(check_tensor_parallel, distill.tensor_parallel),
        partial(check_sequence_parallel, distill.sequence_parallel, distill.seq_len),
    ):
        check({"student": folder})
    if distill.fake_quantize is not None:
        check_fake_quantize({"student": folder})
    if distill.lora is not None:
        check_lora(distill.lora, folder)


def take_ready_student(context: StageContext) -> Facts:
    """Copy the student into the run, which then has all that it is made from."""
    from kdscale.teacher.folders import student_folder
    from kdscale.weights import copy_sidecars, without_own_classes

    folder, code = student_folder(context.config), context.config.teacher.trust_remote_code
    checkpoint, family = open_teacher(folder, context.reporter)
    checkpoint.check_finite()
    with explain_os_errors(context.run.pruned), atomic_dir(context.run.pruned) as tmp:
        for pattern in WEIGHTS:
            for file in sorted(folder.glob(pattern)):
                shutil.copyfile(file, tmp / file.name)
        if not code and (plain := without_own_classes(checkpoint.config)) != checkpoint.config:
            write_json(tmp / "config.json", plain)
        copy_sidecars(folder, tmp, code=code)
    return {"parameters": format_count(family.count_params(checkpoint.config).total, 4)}
