"""Teacher and student of one rank, loaded so that it holds what it keeps and no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdscale.config.root import Config
from kdscale.config.targets import TEACHER_TOKEN
from kdscale.distill.parallel.checks import check_sequence_parallel, check_tensor_parallel
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.parallel.tensor_parallel import ModelSlices, load_sliced_model, tensor_group
from kdscale.distill.parallel.zero3_loading import full_shape, load_zero3, zero3_materialiser
from kdscale.distill.step import StudentModule
from kdscale.errors import CheckpointError
from kdscale.models.loading import load_model, load_tokenizer
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.runtime.ranks import rank
from kdscale.runtime.timeouts import group_timeout
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.placement.placed import PlacedTeacher, ReplicatedTeacher, place_teacher
from kdscale.teacher.remote import ServedTeacher, check_services, read_token
from kdscale.teacher.source import Teacher
from kdscale.teacher.targets import shared_vocabulary
from kdscale.weights import checkpoint_identity


def load_pair(
    cfg: Config,
    teacher_dir: Path,
    student_dir: Path,
    run_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    zero3: dict[str, Any] | None,
) -> tuple[Teacher, StudentModule, ModelSlices | None]:
    """Teacher as `distill.teacher_placement` says; student whole, or, given the DeepSpeed config of a ZeRO-3 run, its
    share of each parameter; with `distill.tensor_parallel` of what this rank has of each, which is said. A collective
    call.

    Raises CheckpointError when the two tokenizers differ or a model cannot be loaded, ConfigError for a teacher that
    cannot be placed so, or a model that cannot be split.
    """
    folders = {"teacher": teacher_dir, "student": student_dir}
    check_tensor_parallel(cfg.distill.tensor_parallel, folders)
    check_sequence_parallel(cfg.distill.sequence_parallel, cfg.distill.seq_len, folders)
    trust = cfg.teacher.trust_remote_code
    tokens = load_tokenizer(teacher_dir, trust).get_vocab()
    if load_tokenizer(student_dir, trust).get_vocab() != tokens:
        raise CheckpointError(f"{student_dir}: tokenizer", expected="the teacher's vocabulary", got="another one")
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust}
    group = tensor_group(cfg.distill.tensor_parallel) if cfg.distill.tensor_parallel > 1 else None
    share = Mesh.of(cfg.distill).sequence_slice(group_timeout(cfg))
    make_teacher, teacher_rows = _reach_teacher(cfg, teacher_dir, run_dir, options, group, share)
    student: Any
    split = None
    if group is not None:
        materialise = None if zero3 is None else zero3_materialiser(zero3, device)
        student, split = load_sliced_model(student_dir, group, materialise=materialise, **options)
    elif zero3 is None:
        student = load_model(student_dir, **options)
    else:
        student = load_zero3(student_dir, zero3, **options)
    rows = split.vocab if split else full_shape(student.get_output_embeddings().weight)[0]
    vocab = shared_vocabulary(teacher_rows, rows, max(tokens.values()) + 1, str(student_dir))
    if cfg.distill.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    share.prepare(student)
    student = student.requires_grad_(True).train()
    shard = split.head if split else None
    return make_teacher(vocab), StudentModule(student, cfg.distill.loss, vocab, shard, share), split


def _reach_teacher(
    cfg: Config, teacher_dir: Path, run_dir: Path, options: dict[str, Any], group: Any, share: SequenceSlice
) -> tuple[Callable[[int], Teacher], int]:
    """The teacher, given how many entries of the vocabulary both models share; and how many rows its head has."""
    loss, served, placement = cfg.distill.loss, cfg.distill.served, cfg.distill.teacher_placement
    if placement == "served":
        token = read_token(Path(served.token_file) if served.token_file else run_dir / TEACHER_TOKEN)
        about = check_services(served.urls, token, checkpoint_identity(teacher_dir), served.timeout)
        return lambda vocab: ServedTeacher(
            served.urls, token, top_k=loss.top_k, temperature=loss.temperature, vocab_size=vocab,
            timeout=served.timeout, first=rank(),
        ), int(about["rows"])  # fmt: skip
    whole = loss.targets == "full"
    placed: PlacedTeacher
    shard = None
    if placement == "replicated" and group is not None:
        model, split = load_sliced_model(teacher_dir, group, **options)
        placed, shard = ReplicatedTeacher(model, split.vocab), split.head
    else:
        placed = place_teacher(teacher_dir, placement, keep_head=whole, **options)
    share.prepare(placed.model)
    return lambda vocab: OnlineTeacher(
        placed, top_k=loss.top_k, temperature=loss.temperature, vocab_size=vocab, whole=whole, shard=shard, share=share
    ), placed.vocab
