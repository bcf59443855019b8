"""The finished student as a standard checkpoint, tensor by tensor, in the layout and dtype of the pruned one.

Weights come from the fp32 masters and are rounded once. Equal weights give equal bytes: nothing here depends on the
time, the machine or the number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from kdscale import files
from kdscale.dist import barrier, is_main
from kdscale.errors import CheckpointError, TrainingError
from kdscale.weights import Checkpoint, ShardWriter, copy_sidecars


def export_student(
    model: Any,
    source_dir: Path,
    out_dir: Path,
    *,
    full_fp32: Callable[[torch.Tensor], torch.Tensor],
    card: str,
    max_shard_bytes: int,
) -> None:
    """Write `model` to `out_dir` with the names and dtypes of `source_dir`, one tensor in memory; a collective call.

    `full_fp32(parameter)` returns the whole fp32 weight on every rank. Tied tensors stay tied because the same names
    are written as in `source_dir`; one on disk that is no parameter (a buffer) is copied. Raises TrainingError on NaN
    or Inf.
    """
    source = Checkpoint.open(source_dir)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with ExitStack() as stack:
        writer: ShardWriter | None = None
        if is_main():
            tmp = stack.enter_context(files.atomic_dir(out_dir))
            shutil.copyfile(source_dir / "config.json", tmp / "config.json")
            copy_sidecars(source_dir, tmp)
            (tmp / "README.md").write_text(card, encoding="utf-8")
            specs = {name: source.spec(name) for name in source.names}
            writer = stack.enter_context(ShardWriter(tmp, specs, max_shard_bytes))
        for name in source.names:
            old = source.tensor(name)
            new = full_fp32(parameters[name]) if name in parameters else old
            _check(name, old, new)
            if writer is not None:
                writer.add(name, new.detach().to(device="cpu", dtype=old.dtype))
    barrier()


def _check(name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    if old.shape != new.shape:
        raise CheckpointError(f"tensor {name}", expected=str(tuple(old.shape)), got=str(tuple(new.shape)))
    if not bool(torch.isfinite(new).all()):
        raise TrainingError(f"the distilled tensor {name} has NaN or infinite values; the student was not written")


def model_card(facts: dict[str, Any]) -> str:
    """README.md of the student: what it was made from and how. `facts` are shown in their order."""
    rows = "\n".join(f"| {name} | {_plain(value)} |" for name, value in facts.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [kdscale, pruned, distilled]\n---\n\n"
        "# Distilled student\n\nPruned from a teacher and distilled on the teacher's top-K probabilities with kdscale. "
        "A standard checkpoint: load it with `AutoModelForCausalLM.from_pretrained`. The teacher's licence and the "
        "licence of the training text apply.\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
