"""The source of targets and the student of one rank, loaded so that the rank holds what it keeps and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdscale.config.distill.targets import combined
from kdscale.config.root import Config
from kdscale.data.token_store import TokenStore
from kdscale.distill.layers.fake_quantize import fake_quantize
from kdscale.distill.layers.recompute import recompute_in_backward
from kdscale.distill.model_pair import model_pair
from kdscale.distill.objectives.base import Objectives
from kdscale.distill.objectives.reference import WithReference, frozen_reference, reference_of
from kdscale.distill.parallel.checks import (
    check_fake_quantize,
    check_lora,
    check_sequence_parallel,
    check_tensor_parallel,
)
from kdscale.distill.parallel.dtypes import teacher_dtype
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.parallel.tensor_parallel import ModelSlices, load_sliced_model, tensor_group
from kdscale.distill.parallel.zero3_loading import full_shape, gather_by_layer, load_zero3, zero3_materialiser
from kdscale.distill.schedule import total_steps
from kdscale.distill.step import StudentModule
from kdscale.errors import CheckpointError, ConfigError
from kdscale.models.compiling import compile_layers
from kdscale.models.head import VocabShard, head_of, pooler_parameters
from kdscale.models.loading import load_model, load_tokenizer
from kdscale.models.lora.adapters import add_adapters
from kdscale.models.parameter_map import ParameterReader
from kdscale.runtime.timeouts import group_timeout
from kdscale.teacher.folders import teacher_folders
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.several import check_tags
from kdscale.teacher.source import LabelChoice, SourceRequest, StudentAverage, TargetSource, open_source
from kdscale.teacher.targets import shared_vocabulary
from kdscale.teacher.vocabulary.across import check_across


@dataclass(frozen=True)
class Models:
    """What a rank trains with; `slices` says which part of the student it holds, where ranks share its layers.

    `choose_labels`, `average`: see teacher.source.OpenedSource.
    """

    source: TargetSource
    student: StudentModule
    slices: ModelSlices | None
    choose_labels: LabelChoice | None = None
    average: StudentAverage | None = None


@dataclass(frozen=True)
class RankSetup:
    """How this rank computes; `deepspeed` is DeepSpeed's config, and what libraries print goes to `library_log`."""

    device: torch.device
    dtype: torch.dtype
    zero_stage: int
    deepspeed: dict[str, Any]
    library_log: Path
    compiled: bool = False  # the layers of student and in-process teacher


@dataclass(frozen=True)
class Folders:
    """What a distillation reads (`student` is the pruned model) and, in `run`, writes."""

    teacher: Path
    student: Path
    data: Path
    run: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.run / "checkpoints"


def load(cfg: Config, folders: Folders, setup: RankSetup) -> Models:
    """Open the source of targets and load the student: whole, or this rank's part of it. A collective call.

    Raises CheckpointError when the two tokenizers differ or a model cannot be loaded, ConfigError for a source that
    cannot give the targets, a teacher that cannot be placed so, or a model that cannot be split.
    """
    settings, trust = cfg.distill, cfg.teacher.trust_remote_code
    teacher_dir, student_dir = folders.teacher, folders.student
    store = TokenStore.open(folders.data)
    check_tags(settings.teachers, store.tags_in_use)
    tokenizer_size = _check_models(cfg, teacher_folders(cfg, teacher_dir), student_dir)
    group = tensor_group(settings.tensor_parallel) if settings.tensor_parallel > 1 else None
    sequence_slice = Mesh.of(settings).sequence_slice(group_timeout(cfg))
    options = {"dtype": setup.dtype, "device": setup.device, "trust_remote_code": trust}
    pair = model_pair(teacher_dir, student_dir) if any(entry.matches_layers for entry in settings.objectives) else None
    steps = total_steps(settings.tokens, settings.seq_len, settings.global_batch)
    entries = [entry.settled(pair, steps) for entry in settings.objectives]
    own = [entry.settled(None, steps) for entry in settings.all_objectives[len(entries) :]]
    needs = combined(entry.needs for entry in [*entries, *own])
    opened = open_source(
        SourceRequest(
            cfg, needs, teacher_dir, folders.run, teacher_dtype(settings.teacher_dtype, setup.dtype), setup.device,
            sequence_slice,
            load_split=None if group is None else _split_loader(group, options),
            student_dir=student_dir, tags=store.tags,
        )
    )  # fmt: skip
    student, slices = _load_student(student_dir, group, setup, options)
    rows = slices.vocab if slices else full_shape(head_of(student).weight_VH)[0]
    vocab_size = shared_vocabulary(opened.rows, rows, tokenizer_size, str(student_dir))
    if settings.fake_quantize is not None:
        fake_quantize(student, settings.fake_quantize, ParameterReader.open(student_dir).linear_maps())
    student = student.requires_grad_(True)
    if settings.lora is not None:
        add_adapters(student, settings.lora, check_lora(settings.lora, student_dir), cfg.seed)
    if opened.take_student is not None:
        opened.take_student(student)
    recompute_in_backward(student, settings.recompute, setup.compiled)
    sequence_slice.prepare(student)
    student = _trainable(student, settings.dropout)
    source, shard = opened.start(vocab_size), slices.head if slices else None
    if missing := needs.missing_from(source.gives):
        placement = f"distill.teacher_placement: {settings.teacher_placement}"
        raise ConfigError(placement, expected=f"a source that gives {missing}", got=source.gives.in_words())
    if setup.compiled:
        for model in (source.model, student)[source.model is student :]:
            compile_layers(model)
        if setup.zero_stage == 3:
            gather_by_layer(student)
    if settings.preferences is not None and settings.preferences.needs_reference:
        source = WithReference(source, _reference(student, student_dir, cfg, vocab_size, options))
    objectives = Objectives(entries, pair, own, settings.own_text.section if settings.own_text else "on_policy")
    objectives.modules.to(setup.device, setup.dtype)
    module = StudentModule(student, objectives, vocab_size, shard, sequence_slice)
    return Models(source, module, slices, opened.choose_labels, opened.average)


def _trainable(student: Any, dropout: bool) -> Any:
    """The student as it is trained: without its pooler, which no objective reads, and without `dropout` none is."""
    student = student.train()
    for name in pooler_parameters(student):
        student.get_parameter(name).requires_grad_(False)
    for module in () if dropout else student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("attention_dropout", "dropout"):  # of layers that keep the share as a number
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return student


def _check_models(cfg: Config, teachers: Mapping[str, Path], student_dir: Path) -> int:
    """Check from config.json and tokenizer alone that the ranks can share all models; how many tokens there are."""
    folders, settings = {f"teacher {name}".strip(): folder for name, folder in teachers.items()}, cfg.distill
    for check_shared in (
        partial(check_tensor_parallel, settings.tensor_parallel),
        partial(check_sequence_parallel, settings.sequence_parallel, settings.seq_len),
    ):
        check_shared({**folders, "student": student_dir})
    if settings.fake_quantize is not None:
        check_fake_quantize({"student": student_dir})
    tokens = load_tokenizer(student_dir, cfg.teacher.trust_remote_code).get_vocab()
    for name, folder in folders.items():
        if load_tokenizer(folder, cfg.teacher.trust_remote_code).get_vocab() == tokens:
            continue
        if settings.teachers:
            check_across(settings, name.removeprefix("teacher "))
        else:
            raise CheckpointError(
                f"{student_dir}: tokenizer", expected=f"the vocabulary of the {name}, {folder}", got="another one"
            )
    return max(tokens.values()) + 1


def _reference(student: Any, path: Path, cfg: Config, vocab_size: int, options: dict[str, Any]) -> OnlineTeacher:
    """The student as it began: itself where its weights stay, and this rank has them whole; else a copy."""
    if cfg.distill.lora is not None and cfg.distill.zero_stage < 3:
        return reference_of(student, vocab_size)
    return frozen_reference(load_model(path, **options), vocab_size)


def _split_loader(group: Any, options: dict[str, Any]) -> Callable[[Path], tuple[Any, int, VocabShard]]:
    def load_split(path: Path) -> tuple[Any, int, VocabShard]:
        model, slices = load_sliced_model(path, group, **options)
        return model, slices.vocab, slices.head

    return load_split


def _load_student(path: Path, group: Any, setup: RankSetup, options: dict[str, Any]) -> tuple[Any, ModelSlices | None]:
    """The student and, where tensor-parallel ranks share it, which part of it this is."""
    if group is not None:
        materialise = zero3_materialiser(setup.deepspeed, setup.device) if setup.zero_stage == 3 else None
        return load_sliced_model(path, group, materialise=materialise, **options)
    if setup.zero_stage == 3:
        return load_zero3(path, setup.deepspeed, **options), None
    return load_model(path, **options), None
