"""Execute a plan: read the teacher in order, slice, compensate, write the student as a standard checkpoint.

Decides nothing. Large tensors pass through in blocks of rows, so that a block is all that is in memory. Without
compensation no layer is ever run. With it the teacher is streamed once more over the calibration batches, one layer in
memory, and each layer's regression is solved and written before the next is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.errors import DataError
from kdscale.families import Family, TensorSpec
from kdscale.files import remove_leftovers, remove_tree, write_json
from kdscale.models.hidden_states import IN_MEMORY, Scratch
from kdscale.models.layer_stream import LayerStream, TokenBatch
from kdscale.prune.compensation.experts import expert_name
from kdscale.prune.compensation.layer_gaps import ROLE, RepairedWeights, find_gaps, repaired_gaps
from kdscale.prune.compensation.one_stream import compensated_layers, compensated_roles
from kdscale.prune.compensation.recovered_error import RecoveredErrors
from kdscale.prune.compensation.two_stream import two_stream_layers
from kdscale.prune.plan import Plan
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_writer
from kdscale.weights import Checkpoint, ShardWriter, TensorInfo, copy_sidecars

_BLOCK_BYTES = 1 << 22  # small enough to stay in the processor's cache from reading to writing
_UNCUT = "vocab"  # the name of an axis that is never cut
_JOURNAL, _PASS, _GAPS = "written.json", "compensation", "gaps"


class _Pair(NamedTuple):
    source: str
    target: str
    spec: TensorSpec
    position: int | None  # the student's layer


def apply_plan(
    teacher: Checkpoint,
    family: Family,
    plan: Plan,
    out_dir: Path,
    prune_cfg: PruneConfig,
    *,
    batches: Sequence[TokenBatch] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    reporter: Reporter | None = None,
    scratch: Scratch = IN_MEMORY,
    residuals: RecoveredErrors | None = None,
) -> None:
    """Write the student to the folder `out_dir`.

    The tensors keep the teacher's dtype and are the same bytes for the same inputs; a tensor that the plan does not cut
    is copied bit for bit. `batches` are needed when the plan compensates ffn or heads or repairs gaps; `dtype` and
    `device` are those of these passes, and `residuals` records what each regression won back. With a folder in
    `scratch` a killed call is taken up again, in the same `out_dir`, at the first layer that it had not finished. With
    several ranks each has its share of `batches` and a `scratch` of its own, and one writes. Raises DataError when
    batches are missing and SelfCheckError when a regression fails.
    """
    device, reporter = device or torch.device("cpu"), reporter or Reporter(quiet=True)
    slicer = Slicer(teacher.config, family, plan)
    compensates, mends = bool(compensated_roles(plan, slicer)), bool(find_gaps(plan))
    if (compensates or mends) and not sum(batch.input_ids_BS.numel() for batch in batches):
        needs, field = ("compensation", "compensate") if compensates else ("the repair of layer gaps", "layer_repair")
        raise DataError(f"{needs} needs calibration tokens", hint=f"or set prune.{field}=none")
    stream = LayerStream(teacher.config, family, teacher.tensor, dtype=dtype, device=device)
    mended = repaired_gaps(stream, slicer, batches, prune_cfg, teacher, reporter, scratch.subfolder(_GAPS))
    kind = two_stream_layers if plan.methods.compensate == "two_stream" else compensated_layers
    repair = partial(kind, mended=mended)
    if not is_writer():
        if compensates:
            for _ in repair(stream, slicer, batches, prune_cfg, teacher, reporter, scratch.subfolder(_PASS)):
                raise AssertionError("only the rank that writes is given weights")
        mended.close()
        return
    pairs = [_Pair(*pair, None) for pair in slicer.outer()]
    pairs += [_Pair(*pair, position) for position in range(plan.student.layers) for pair in slicer.layer(position)]
    pairs.sort(key=lambda pair: teacher.position(pair.source))
    ours = family.tensors(slicer.student_config)
    specs = {pair.target: TensorInfo(ours[pair.target].shape, teacher.spec(pair.source).dtype) for pair in pairs}
    specs = {name: specs[name] for name in ours}  # the family's order on disk
    journal = scratch.folder / _JOURNAL if scratch.folder is not None else None
    remove_leftovers(out_dir)
    with ShardWriter(out_dir, specs, prune_cfg.max_shard_bytes, journal=journal) as writer:
        if compensates:
            if scratch.folder is not None and not writer.written:
                remove_tree(scratch.folder / _PASS)  # the layers that it has done are not in these files
            solved = repair(stream, slicer, batches, prune_cfg, teacher, reporter, scratch.subfolder(_PASS), residuals)
            _write(writer, teacher, slicer, (pair for pair in pairs if pair.position is None))
            writer.commit()
            for position, changed in solved:
                ours_only = (pair for pair in pairs if pair.position == position)
                _write(writer, teacher, slicer, ours_only, changed | _mended(mended, position))
                writer.commit()
        else:
            # a checkpoint has its layers one after the other, in whatever order: a layer at a time is made safe
            for place, group in groupby(pairs, key=lambda pair: pair.position):
                _write(writer, teacher, slicer, group, _mended(mended, place))
                writer.commit()
    mended.close()
    write_json(out_dir / "config.json", slicer.student_config)
    copy_sidecars(teacher.path, out_dir)


def _mended(mended: RepairedWeights, position: int | None) -> dict[str, Tensor]:
    weight = None if position is None else mended.get(position)
    return {} if weight is None else {ROLE: weight}


def _write(
    writer: ShardWriter,
    teacher: Checkpoint,
    slicer: Slicer,
    pairs: Iterable[_Pair],
    changed: dict[str, Tensor] | None = None,
) -> None:
    """Slice and write those of `pairs` that no earlier call has written; `changed`: new weights by role and expert."""
    for pair in pairs:
        if pair.target in writer.written:
            continue
        if changed and (name := expert_name(pair.spec.role, pair.spec.expert)) in changed:
            writer.add(pair.target, changed[name].to(writer.dtype(pair.target)))
        else:
            writer.add_blocks(pair.target, _sliced(teacher, slicer, pair))


def _sliced(teacher: Checkpoint, slicer: Slicer, pair: _Pair) -> Iterator[Tensor]:
    """`slicer.slice` of the teacher's tensor, in blocks of its rows."""
    spec, position = pair.spec, pair.position
    if len(spec.shape) == 1:
        yield slicer.slice(teacher.tensor(pair.source), spec, position)
        return
    kept = [_kept(slicer, spec, dimension, position) for dimension in range(len(spec.shape))]
    no_cut = replace(spec, axes=(_UNCUT,) * len(spec.axes))  # for what else the slicer does to a tensor
    begin = 0
    for block in teacher.blocks(pair.source, _BLOCK_BYTES):
        rows = None if kept[0] is None else kept[0][(kept[0] >= begin) & (kept[0] < begin + len(block))] - begin
        begin += len(block)
        part = block if rows is None else block[rows]
        for dimension, indices in enumerate(kept[1:], 1):
            if indices is not None:
                part = _take(part, dimension, indices)
        yield slicer.slice(part, no_cut, position)


def _kept(slicer: Slicer, spec: TensorSpec, dimension: int, position: int | None) -> Tensor | None:
    """Which indices of one dimension stay, found by slicing the row of all of them; None when all do."""
    alone = replace(spec, axes=(spec.axes[dimension],), shape=(spec.shape[dimension],), role="")
    every = torch.arange(spec.shape[dimension])
    kept = slicer.slice(every, alone, position)
    return None if len(kept) == len(every) else kept


def _take(tensor: Tensor, dimension: int, indices: Tensor) -> Tensor:
    """`index_select`, four times as fast on 2-byte columns: numpy copies them as plain integers."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    taken = tensor.view(whole).numpy().take(indices.numpy(), axis=dimension)
    return torch.from_numpy(taken).view(tensor.dtype)
