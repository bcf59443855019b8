"""Teacher and student of one rank, loaded so that it holds what it keeps and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdscale.config import Config
from kdscale.distill.step import StudentModule
from kdscale.errors import CheckpointError
from kdscale.models import load_model, load_tokenizer
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.placement import place_teacher
from kdscale.teacher.targets import shared_vocabulary


def load_pair(
    cfg: Config,
    teacher_dir: Path,
    student_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    zero3: dict[str, Any] | None,
) -> tuple[OnlineTeacher, StudentModule]:
    """Teacher as `distill.teacher_placement` says; student whole, or, given the DeepSpeed config of a ZeRO-3 run, its
    share of each parameter. A collective call.

    Raises CheckpointError when the two tokenizers differ or a model cannot be loaded, ConfigError for a teacher that
    cannot be placed so.
    """
    trust = cfg.teacher.trust_remote_code
    tokens = load_tokenizer(teacher_dir, trust).get_vocab()
    if load_tokenizer(student_dir, trust).get_vocab() != tokens:
        raise CheckpointError(f"{student_dir}: tokenizer", expected="the teacher's vocabulary", got="another one")
    loss = cfg.distill.loss
    whole = loss.targets == "full"
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust}
    placed = place_teacher(teacher_dir, cfg.distill.teacher_placement, keep_head=whole, **options)
    if zero3 is None:
        student: Any = load_model(student_dir, **options)
    else:
        from kdscale.distill.zero3 import load_zero3

        student = load_zero3(student_dir, zero3, **options)
    rows = whole_shape(student.get_output_embeddings().weight)[0]
    vocab = shared_vocabulary(placed.vocab, rows, max(tokens.values()) + 1, str(student_dir))
    if cfg.distill.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    teacher = OnlineTeacher(placed, top_k=loss.top_k, temperature=loss.temperature, vocab_size=vocab, whole=whole)
    return teacher, StudentModule(student.requires_grad_(True).train(), loss, vocab)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, which ZeRO-3 keeps elsewhere while it is partitioned."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
