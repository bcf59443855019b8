"""Execute a plan: read the teacher in order, slice, compensate, write the student as a standard checkpoint.

Decides nothing. Large tensors pass through in blocks of rows, so that one block at a time is in memory. Without
compensation no layer is ever run. With it the teacher is streamed once more over the calibration batches, one layer in
memory, and each layer's regression is solved and written before the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError, DataError
from kdscale.families import Family
from kdscale.files import remove_leftovers, remove_tree, write_json
from kdscale.models.hidden_states import IN_MEMORY, Scratch
from kdscale.models.layer_stream import LayerStream, TokenBatch
from kdscale.prune.carried import carried_blocks, carried_specs
from kdscale.prune.compensation.experts import new_weight
from kdscale.prune.compensation.layer_gaps import RepairedWeights, find_gaps, repaired_gaps
from kdscale.prune.compensation.one_stream import compensated_layers, compensates
from kdscale.prune.compensation.recovered_error import RecoveredErrors
from kdscale.prune.compensation.stream_refit import FINAL_NORM, refitted_layers
from kdscale.prune.compensation.two_stream import two_stream_layers
from kdscale.prune.plan import Plan
from kdscale.prune.slicing import SlicedTensor, Slicer
from kdscale.prune.stream_cut import METHOD as REFIT
from kdscale.prune.stream_cut import CutStudent, StreamBasis
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_writer
from kdscale.weights import Checkpoint, ShardWriter, TensorInfo, copy_sidecars, without_own_classes
from kdscale.weights.tensor_bytes import torch_dtype

_BLOCK_BYTES = 1 << 22  # small enough to stay in the processor's cache from reading to writing
_JOURNAL, _PASS, _GAPS = "written.json", "compensation", "gaps"  # in the scratch folder

# (the student's layer, its new weights by role and expert); layer None: outside the layers
Compensated = Iterator[tuple[int | None, dict[str, Tensor]]]


Blocks = Callable[[SlicedTensor], Iterator[Tensor]]  # what a tensor of the student is without regression, by rows


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
    recovered: RecoveredErrors | None = None,
    code: bool = False,
    basis: StreamBasis | None = None,
) -> None:
    """Write the student to the folder `out_dir`; `basis` is needed where the plan's hidden axis is cut by `refit`.

    The tensors keep the teacher's dtype and are the same bytes for the same inputs; a tensor that the plan does not cut
    is copied bit for bit. `batches` are needed when the plan compensates ffn or heads or repairs gaps; `dtype` and
    `device` are those of these passes, and `recovered` collects what each regression won back. With a folder in
    `scratch` a killed call is resumed, in the same `out_dir`, at the last layer that it had saved. With several
    ranks each has its share of `batches` and a `scratch` of its own, and one writes. With `code` the teacher's own
    classes go along. Raises DataError when batches are missing and SelfCheckError when a regression fails.
    """
    device, reporter = device or torch.device("cpu"), reporter or Reporter(quiet=True)
    slicer = Slicer(teacher.config, family, plan)
    start = _refit_start(slicer, teacher, basis)
    refits, repairs = start is not None or compensates(plan, slicer), bool(find_gaps(plan))
    if (refits or repairs) and not sum(batch.input_ids_BS.numel() for batch in batches):
        needs, field = ("compensation", "compensate") if refits else ("the repair of layer gaps", "layer_repair")
        raise DataError(f"{needs} needs calibration tokens", hint=f"or set prune.{field}=none")
    stream = LayerStream(teacher.config, family, teacher.tensor, dtype=dtype, device=device)
    repaired = repaired_gaps(stream, slicer, batches, prune_cfg, teacher, reporter, scratch.subfolder(_GAPS))

    def compensated(recovered: RecoveredErrors | None = None) -> Compensated:
        if start is not None:
            return refitted_layers(stream, start, batches, prune_cfg, reporter, scratch.subfolder(_PASS), recovered)
        compensate = two_stream_layers if plan.methods.compensate == "two_stream" else compensated_layers
        folder = scratch.subfolder(_PASS)
        return compensate(stream, slicer, batches, prune_cfg, teacher, reporter, folder, recovered, repaired)

    if is_writer():
        remove_leftovers(out_dir)
        with _open_writer(out_dir, teacher, slicer, prune_cfg, scratch) as writer:
            if refits and scratch.folder is not None and not writer.written:
                remove_tree(scratch.folder / _PASS)  # the layers that it has done are not in these files
            of_tensor = _cut_blocks(teacher, start) if start is not None else _sliced_blocks(teacher, slicer)
            _write_student(writer, teacher, slicer, of_tensor, repaired, compensated(recovered) if refits else None)
            _write_carried(writer, teacher, slicer, start)
        config = slicer.student_config if code else without_own_classes(slicer.student_config)
        if config != slicer.student_config:
            reporter.say("  note: the teacher's own code (auto_map) is left out: teacher.trust_remote_code is false")
        write_json(out_dir / "config.json", config)
        copy_sidecars(teacher.path, out_dir, code=code)
    elif refits:
        for _ in compensated():
            raise AssertionError("only the rank that writes is given weights")
    repaired.close()


def _refit_start(slicer: Slicer, teacher: Checkpoint, basis: StreamBasis | None) -> CutStudent | None:
    """The student before its stream is refitted; None where the plan does not cut the hidden axis so."""
    if slicer.plan.methods.hidden != REFIT:
        return None
    if basis is None or find_gaps(slicer.plan):
        got = "layer_repair linear" if basis is not None else "no directions of the stream"
        raise ConfigError("a plan with the hidden axis cut by refit", expected="the importance scores", got=got)
    return CutStudent(slicer, teacher.tensor, basis)


def _open_writer(out_dir: Path, teacher: Checkpoint, slicer: Slicer, cfg: PruneConfig, scratch: Scratch) -> ShardWriter:
    """A writer for the student's tensors, in the family's order on disk and in the teacher's dtypes."""
    sources = {tensor.target: tensor.source for tensor in slicer.tensors()}
    expected = slicer.family.tensors(slicer.student_config)
    specs = {name: TensorInfo(spec.shape, teacher.spec(sources[name]).dtype) for name, spec in expected.items()}
    specs |= carried_specs(teacher, slicer)
    journal = scratch.folder / _JOURNAL if scratch.folder is not None else None
    return ShardWriter(out_dir, specs, cfg.max_shard_bytes, journal=journal)


def _write_carried(writer: ShardWriter, teacher: Checkpoint, slicer: Slicer, start: CutStudent | None) -> None:
    """Write what goes along with the language model, where it is not written yet."""
    for name in (name for name in teacher.carried if name not in writer.written):
        writer.add_blocks(name, carried_blocks(teacher, slicer, name, start))


def _write_student(
    writer: ShardWriter,
    teacher: Checkpoint,
    slicer: Slicer,
    blocks: Blocks,
    repaired: RepairedWeights,
    compensated: Compensated | None,
) -> None:
    """Write all tensors, committing layer by layer; `compensated`: new weights, None where the plan has none."""
    tensors = sorted(
        slicer.tensors(), key=lambda tensor: teacher.position(tensor.source)
    )  # each file read once through
    if compensated is None:
        # a checkpoint has its layers one after the other, in whatever order: a layer at a time is made safe
        for position, group in groupby(tensors, key=lambda tensor: tensor.position):
            _write(writer, slicer, blocks, group, repaired.get(position))
            writer.commit()
        return
    last = FINAL_NORM if slicer.plan.methods.hidden == REFIT else None
    _write(writer, slicer, blocks, (t for t in tensors if t.position is None and t.spec.role != last))
    writer.commit()
    for position, weights in compensated:
        of_layer = (tensor for tensor in tensors if tensor.position == position)
        if position is None:
            of_layer = (tensor for tensor in of_layer if tensor.spec.role == last)
        _write(writer, slicer, blocks, of_layer, weights | repaired.get(position))
        writer.commit()


def _write(
    writer: ShardWriter,
    slicer: Slicer,
    blocks: Blocks,
    tensors: Iterable[SlicedTensor],
    new_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Slice and write those of `tensors` that no earlier call has written; `new_weights`: by role and expert."""
    for tensor in tensors:
        if tensor.target in writer.written:
            continue
        weight = new_weight(tensor, new_weights or {}, slicer)
        if weight is not None:
            writer.add(tensor.target, weight.to(writer.dtype(tensor.target)))
        else:
            writer.add_blocks(tensor.target, blocks(tensor))


def _cut_blocks(teacher: Checkpoint, start: CutStudent) -> Blocks:
    """The student's tensors before the refit, in the teacher's dtypes; the embedding and the head in blocks of rows."""

    def of_tensor(tensor: SlicedTensor) -> Iterator[Tensor]:
        dtype = torch_dtype(teacher.spec(tensor.source).dtype)
        if tensor.spec.role in ("embed", "head"):
            for block in start.blocks(tensor, teacher.blocks(tensor.source, _BLOCK_BYTES)):
                yield block.to(dtype)
        else:
            yield start.cut(teacher.tensor(tensor.source), tensor).to(dtype)

    return of_tensor


def _sliced_blocks(teacher: Checkpoint, slicer: Slicer) -> Blocks:
    """`slicer.slice` of the teacher's tensors, in blocks of their rows."""
    return lambda tensor: _slices(teacher, slicer, tensor)


def _slices(teacher: Checkpoint, slicer: Slicer, tensor: SlicedTensor) -> Iterator[Tensor]:
    source, _, spec, position = tensor
    if len(spec.shape) < 2:
        yield slicer.slice(teacher.tensor(source), spec, position)
        return
    if spec.stacked:
        yield from _expert_slices(teacher, slicer, tensor)
        return
    kept = [None if indices is None else torch.tensor(indices) for indices in slicer.kept_indices(spec, position)]
    begin = 0
    for block in teacher.blocks(source, _BLOCK_BYTES):
        rows = None if kept[0] is None else kept[0][(kept[0] >= begin) & (kept[0] < begin + len(block))] - begin
        begin += len(block)
        sliced = block if rows is None else block[rows]
        for dimension, indices in enumerate(kept[1:], 1):
            if indices is not None:
                sliced = _take(sliced, dimension, indices)
        yield slicer.rescale(sliced, spec)


def _expert_slices(teacher: Checkpoint, slicer: Slicer, tensor: SlicedTensor) -> Iterator[Tensor]:
    """The same for a tensor that holds those of all experts: each keeps units of its own."""
    source, _, spec, position = tensor
    experts, begin = set(slicer.kept_experts(position)), 0
    for block in teacher.blocks(source, _BLOCK_BYTES):
        here = [expert for expert in range(begin, begin + len(block)) if expert in experts]
        kept = [slicer.slice_expert(block[expert - begin], spec, position, expert) for expert in here]
        begin += len(block)
        if kept:
            yield torch.stack(kept)


def _take(tensor: Tensor, dimension: int, indices: Tensor) -> Tensor:
    """`index_select`, four times as fast on 2-byte columns: numpy copies them as plain integers."""
    same_width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    taken = tensor.view(same_width).numpy().take(indices.numpy(), axis=dimension)
    return torch.from_numpy(taken).view(tensor.dtype)
