"""The correct stage: fine-tune the teacher on the run's own text before it teaches.

A teacher that has seen other text is a poor guide on this one (arXiv 2408.11796, "Teacher Correction"). The fine-tuning
is a distillation run inside the run, in `work/correct/`, whose pruned model is the whole teacher and whose objective
needs no teacher: the same trainer, engine, ranks, checkpoints and resuming.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from kdscale.config.root import Config
from kdscale.files import atomic_path, replace_dir, write_text
from kdscale.models.loading import open_teacher
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.pipeline.stages import distill
from kdscale.runs.folder import CARD, CORRECTED, CORRECTION_METRICS, RunFolder


def correction(context: StageContext) -> Config:
    """The config of the fine-tuning."""
    config = context.config.correction()
    assert config is not None, "a run without this section has no such stage"
    return config


def what_it_depends_on(context: StageContext) -> Facts:
    """The settings of the fine-tuning that the corrected weights depend on."""
    return {"distill": correction(context).distill.decisive()}


def disk_bytes(context: StageContext, student_params: int) -> int:
    """The corrected teacher and the checkpoints of its fine-tuning, which are deleted when it is finished."""
    teacher, family = open_teacher(context.teacher)
    inner = replace(context, config=correction(context))
    return distill.disk_bytes(inner, family.count_params(teacher.config).total)


def copied_from_and_to(context: StageContext) -> tuple[Path, Path]:
    """Tokenizer, licence and the like come from the teacher."""
    return context.teacher, context.run.at(CORRECTED)


def correct_teacher(context: StageContext) -> Facts:
    """Fine-tune to the end or raise; returns the held-out perplexity before and after."""
    from kdscale.distill.checkpoint import folder as checkpoint_folder
    from kdscale.packaging.model_card import card_facts, model_card

    assert context.run_inner is not None
    config = correction(context)
    inner = RunFolder(Path(config.run_dir))
    alone = replace(context, corrected=None, pruned_from=None)
    context.run_inner(alone, config, ("distill",), {"data": context.run.data, "pruned": context.teacher})
    manifest = checkpoint_folder.read_manifest(checkpoint_folder.sealed_checkpoints(inner.checkpoints)[0])
    card = model_card(card_facts(config, manifest), title="Corrected teacher", origin="The teacher, trained further")
    write_text(inner.student / CARD, card)
    with atomic_path(context.run.at(CORRECTION_METRICS)) as tmp:
        shutil.copyfile(inner.metrics, tmp)
    facts = distill.held_out(inner)
    replace_dir(inner.student, context.run.at(CORRECTED))
    return facts
