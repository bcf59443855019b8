"""The student stage: a ready model in the place of a pruned one. It may be of another architecture than the teacher.

It has the teacher's tokens; heads may differ in their padding, which then gets no probability.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from kdscale.config.root import Config
from kdscale.errors import CheckpointError
from kdscale.files import atomic_dir, explain_os_errors, write_json
from kdscale.models.loading import load_tokenizer, open_teacher
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import WEIGHTS, RunFolder
from kdscale.units import format_count


def what_matters(context: StageContext) -> Facts:
    """The student's weights."""
    from kdscale.teacher.folders import student_folder

    return {"student": digest_tree(student_folder(context.config), WEIGHTS)}


def disk_bytes(context: StageContext, student_params: int) -> int:
    """A copy of its files."""
    from kdscale.teacher.folders import student_folder

    del student_params
    return sum(file.stat().st_size for file in student_folder(context.config).glob("*.safetensors"))


def copied_from_and_to(context: StageContext) -> tuple[Path, Path]:
    """Tokenizer, licence and the like come from the student's own folder."""
    from kdscale.teacher.folders import student_folder

    return student_folder(context.config), context.run.pruned


def check_before(config: Config, run: RunFolder) -> None:
    """Raises ConfigError for a student that is not there or that ranks cannot share as the config says, CheckpointError
    for one that cannot be trained, or that has other tokens than the teacher."""
    from kdscale.distill.parallel.checks import check_fake_quantize, check_sequence_parallel, check_tensor_parallel
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


def take_student(context: StageContext) -> Facts:
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
