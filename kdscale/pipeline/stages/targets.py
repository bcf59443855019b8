"""The targets stage: the teacher's targets of every sequence that is trained or validated on, into a store."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.target_store import MOST_SHARDS
from kdscale.errors import RunFolderError
from kdscale.files import explain_os_errors
from kdscale.models.loading import open_teacher
from kdscale.pipeline.spawn import join_ranks, own_rank, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import TARGETS, WEIGHTS
from kdscale.units import format_size

if TYPE_CHECKING:
    from kdscale.config.target_store import TargetsConfig
    from kdscale.teacher.store.format import StoreHeader

_FEWEST_SEQUENCES = 16  # in a shard


def what_matters(context: StageContext) -> Facts:
    """What the targets depend on beside the teacher and the text."""
    distill, settings = context.config.distill, _settings(context)
    facts: dict[str, Any] = {"targets": settings.decisive(), "path": settings.path}
    facts |= {name: getattr(distill, name) for name in ("seq_len", "tokens", "global_batch", "validate_tokens")}
    if settings.positions == "entropy":
        facts["student"] = digest_tree(context.run.pruned, WEIGHTS)
    return facts


def disk_bytes(context: StageContext, student_params: int) -> int:
    """The rows of all training and held-out tokens."""
    from kdscale.teacher.store.codecs import make_codec

    settings, distill = _settings(context), context.config.distill
    codec = make_codec(settings.codec, *_head_shape(context))
    return math.ceil((distill.tokens * settings.decisive()["share"] + distill.validate_tokens) * codec.row_bytes)


def disk_folder(context: StageContext) -> Path:
    """Where the store is: in the run folder, or in one that several runs share."""
    path = _settings(context).path
    return context.run.at(TARGETS) if path is None else Path(path)


def write_targets(context: StageContext) -> Facts:
    """Write what is missing of the store; returns how much it holds."""
    from kdscale.teacher.store.binding import check_same
    from kdscale.teacher.store.format import HEADER_FILE, read_header
    from kdscale.teacher.store.reader import StoreReader
    from kdscale.teacher.store.writer import store_lock, write_header

    folder, wanted = _folder(context), _header(context)
    begun = folder / HEADER_FILE
    finished = begun.exists() and StoreReader(folder).is_finished
    with nullcontext() if finished else store_lock(folder):
        if not begun.exists():
            write_header(folder, wanted)
        check_same(folder, read_header(folder), wanted)
        if not finished:
            run_on_ranks("targets", targets_rank, context, ranks_of(context.config, "targets.processes"))
    rows, nbytes = StoreReader(folder).totals()
    return {"positions": f"{rows:,}", "size": format_size(nbytes), "bytes a position": f"{nbytes / max(rows, 1):.1f}"}


def targets_rank(context: StageContext) -> None:
    """Write every shard that is this rank's and is not finished."""
    from kdscale.pipeline.target_writing import write_own_shards

    device = join_ranks(context)
    write_own_shards(context, _settings(context), context.run.at(TARGETS), own_rank(context), device)


def _settings(context: StageContext) -> TargetsConfig:
    settings = context.config.targets
    assert settings is not None, "a run without the section has no such stage"
    return settings


def _head_shape(context: StageContext) -> tuple[int, int]:
    """(rows of the teacher's head, hidden size)."""
    teacher, family = open_teacher(context.model_to_learn_from)
    dims = family.dims(teacher.config)
    return dims.vocab, dims.hidden


def _header(context: StageContext) -> StoreHeader:
    """The header of the store that this run wants."""
    from kdscale.distill.schedule import total_steps
    from kdscale.pipeline.target_writing import heldout_sequences
    from kdscale.teacher.store.binding import made_from
    from kdscale.teacher.store.format import StoreHeader

    config, settings, run = context.config, _settings(context), context.run
    distill, (vocab, hidden) = config.distill, _head_shape(context)
    heldout = len(heldout_sequences(context))
    train = total_steps(distill.tokens, distill.seq_len, distill.global_batch) * distill.global_batch
    few = max(_FEWEST_SEQUENCES, -(-(heldout + train) // MOST_SHARDS))
    chooses = settings.positions == "entropy"
    return StoreHeader(
        codec=settings.codec.model_dump(mode="json"),
        vocab_size=vocab,
        hidden_size=hidden,
        seq_len=distill.seq_len,
        heldout=heldout,
        train=train,
        shard_sequences=min(few, max(1, settings.shard_tokens // distill.seq_len)),
        share=settings.share if chooses else 1.0,
        dtype=distill.dtype,
        packing={"seed": config.seed, "validate_tokens": distill.validate_tokens},
        made_from=made_from(context.model_to_learn_from, run.data, run.pruned if chooses else None),
    )


def _folder(context: StageContext) -> Path:
    """The folder of the store: in the run folder, where a link leads to one that several runs share."""
    place, path = context.run.at(TARGETS), _settings(context).path
    if path is None:
        return place
    target = Path(path).absolute()
    with explain_os_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        raise RunFolderError(
            f"{place} is in the way of a link to targets.path", expected="a run without a store of its own",
            hint="move it away, for example to targets.path",
        )  # fmt: skip
    place.symlink_to(os.path.relpath(target.resolve(), place.parent.resolve()), target_is_directory=True)
    return place
