"""A student as a standard checkpoint, made from a training checkpoint's files alone.

No process group, no model, no engine: fp32 masters are read block by block from the ranks' files and rounded once to
the dtype each tensor has in the pruned student; the optimiser's moments are not touched. Equal weights give equal
bytes: nothing here depends on the time, the machine, the number of ranks or the ZeRO stage.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kdscale import files
from kdscale.config import Config
from kdscale.distill import state
from kdscale.distill.names import trained_tensors
from kdscale.distill.pieces import KINDS, Piece, PieceIndex, PieceReader
from kdscale.errors import TrainingError
from kdscale.weights import Checkpoint, ShardWriter, copy_sidecars

_BLOCK_BYTES = 1 << 26


def export_checkpoint(
    path: Path, manifest: Mapping[str, Any], source_dir: Path, out_dir: Path, *, card: str, max_shard_bytes: int
) -> None:
    """Write the student of checkpoint `path` (`manifest`: what state.verify returned) to `out_dir`.

    Names, dtypes, config and sidecars are those of the pruned student `source_dir`; a tensor there that was not trained
    is copied. Memory: a few blocks of 64 MiB. Raises CheckpointError when the two do not belong together, TrainingError
    on NaN or Inf.
    """
    source = Checkpoint.open(source_dir)
    index = PieceIndex(state.data_files(path, manifest), manifest["parameters"])
    trained = trained_tensors(source, index.shapes, manifest["tied"])
    with files.atomic_dir(out_dir) as tmp:
        shutil.copyfile(source_dir / "config.json", tmp / "config.json")
        copy_sidecars(source_dir, tmp)
        (tmp / "README.md").write_text(card, encoding="utf-8")
        specs = {name: source.spec(name) for name in source.names}
        with ShardWriter(tmp, specs, max_shard_bytes) as writer, PieceReader(index) as reader:
            for name in source.names:
                if name in trained:
                    blocks = _blocks(reader, trained[name], specs[name].shape, writer.dtype(name), name)
                    writer.add_blocks(name, blocks)
                else:
                    writer.add_blocks(name, source.blocks(name, _BLOCK_BYTES))


def _blocks(
    reader: PieceReader, piece: Piece, shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> Iterator[torch.Tensor]:
    """A tensor of `shape` in blocks of whole rows. Raises TrainingError on a value that is not finite."""
    rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
    step = max(1, _BLOCK_BYTES // 4 // max(width, 1))
    for row in range(0, rows, step):
        count = min(step, rows - row)
        values = torch.empty(count * width)
        reader.fill(KINDS[0], Piece(piece.name, piece.offset + row * width, count * width), values)
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(f"the distilled tensor {name} has NaN or infinite values; the student was not written")
        yield values.to(dtype).reshape(count, *shape[1:]) if shape else values.to(dtype).reshape(())


def card_facts(cfg: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card says of a checkpoint of the run of `cfg`."""
    settings, loss, step = cfg.distill, cfg.distill.loss, int(manifest["step"])
    listed = "whole vocabulary" if loss.targets == "full" else f"teacher's top {loss.top_k}, tail: {loss.tail}"
    return {
        "teacher": Path(cfg.teacher.path).name,
        "training tokens": step * settings.global_batch * settings.seq_len,
        "optimiser steps": step,
        "sequence length": settings.seq_len,
        "sequences a step": settings.global_batch,
        "loss": f"{loss.ce_weight:g}·CE + {1 - loss.ce_weight:g}·T²·{loss.divergence}, T = {loss.temperature:g}, "
        f"{listed}",
        "learning rate": f"{settings.optimizer.lr:g} → {settings.optimizer.min_lr:g}, cosine",
        "computed in": f"{manifest['fingerprint']['distill']['dtype']} with fp32 master weights",
        "skipped steps": manifest["state"]["guard"]["total"],
        "seed": cfg.seed,
    }


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
