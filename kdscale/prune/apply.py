"""Execute a plan: read the teacher tensor by tensor, slice, compensate, write the student as a standard checkpoint.

Decides nothing. Without compensation no layer is ever run. With it the teacher is streamed once more over the
calibration batches, one layer in memory, and each layer's regression is solved and written before the next is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdscale.config import PruneConfig
from kdscale.errors import DataError
from kdscale.families import Family
from kdscale.files import write_json
from kdscale.progress import Reporter
from kdscale.prune.plan import Plan
from kdscale.prune.repair import compensated_layers, compensated_roles
from kdscale.prune.residual import Residuals
from kdscale.prune.slicing import Slicer
from kdscale.prune.stream import LayerStream, TokenBatch
from kdscale.prune.two_stream import two_stream_layers
from kdscale.weights import Checkpoint, ShardWriter, TensorInfo, copy_sidecars


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
    residuals: Residuals | None = None,
) -> None:
    """Write the student to the existing folder `out_dir` (the caller's temporary one; see files.atomic_dir).

    The tensors keep the teacher's dtype and are the same bytes for the same inputs; a tensor that the plan does not cut
    is copied bit for bit. `batches` are needed when the plan compensates ffn or heads; `dtype` and `device` are those
    of that pass, and `residuals` records what each regression won back. Raises DataError when batches are missing and
    SelfCheckError when a regression fails.
    """
    device, reporter = device or torch.device("cpu"), reporter or Reporter(quiet=True)
    slicer = Slicer(teacher.config, family, plan)
    repaired: Iterator[dict[str, Tensor]]
    if compensated_roles(plan, slicer):
        if not sum(batch.input_ids_BS.numel() for batch in batches):
            raise DataError("compensation needs calibration tokens", hint="or set prune.compensate=none")
        stream = LayerStream(teacher.config, family, teacher.tensor, dtype=dtype, device=device)
        ridge, correction = prune_cfg.ridge_lambda, prune_cfg.stream_correction
        if plan.methods.compensate == "two_stream":
            repaired = two_stream_layers(stream, slicer, batches, ridge, correction, teacher, reporter, residuals)
        else:
            repaired = compensated_layers(stream, slicer, batches, ridge, teacher, reporter, residuals)
    else:
        repaired = iter([{} for _ in plan.kept.layers])
    pairs = [*slicer.outer(), *(pair for position in range(plan.student.layers) for pair in slicer.layer(position))]
    ours = family.tensors(slicer.student_config)
    specs = {target: TensorInfo(ours[target].shape, teacher.spec(source).dtype) for source, target, _ in pairs}
    specs = {name: specs[name] for name in ours}  # the family's order on disk
    with ShardWriter(out_dir, specs, prune_cfg.max_shard_bytes) as writer:
        for source, target, spec in slicer.outer():
            writer.add(target, slicer.slice(teacher.tensor(source), spec, None))
        for position, changed in zip(range(plan.student.layers), repaired, strict=True):
            for source, target, spec in slicer.layer(position):
                sliced = slicer.slice(teacher.tensor(source), spec, position)
                writer.add(target, changed[spec.role].to(sliced.dtype) if spec.role in changed else sliced)
    write_json(out_dir / "config.json", slicer.student_config)
    copy_sidecars(teacher.path, out_dir)
