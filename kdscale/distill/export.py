"""A student as a standard model folder, made from the files of a training checkpoint alone.

No process group, model or engine is needed: fp32 masters are read block by block from the ranks' files and rounded once
to the dtype that each tensor has in the pruned student; the optimiser's moments are not read. Equal weights give equal
bytes, whatever the time, the machine, the number of ranks or the ZeRO stage.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdscale import files
from kdscale.config.distill.lora import LoraConfig
from kdscale.config.load import load_config
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint.merge_adapters import AdaptersOnDisk, write_merged
from kdscale.distill.checkpoint.rank_files import MASTER, RankFileIndex, RankFileReader, quantities_of
from kdscale.errors import CheckpointError, RunFolderError, TrainingError
from kdscale.files import sha256_file
from kdscale.models.parameter_map import ParameterRange, trained_tensors
from kdscale.runs.folder import CARD, RunFolder
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint, ShardWriter, copy_sidecars, without_own_classes

_BLOCK_BYTES = 1 << 26


def export_checkpoint(
    path: Path,
    manifest: Mapping[str, Any],
    source_dir: Path,
    out_dir: Path,
    *,
    card: str,
    max_shard_bytes: int,
    code: bool = False,
    lora: LoraConfig | None = None,
    adapter_dir: Path | None = None,
) -> None:
    """Write the student of checkpoint `path` to `out_dir`; `manifest` is what `folder.verify` returned.

    Names, dtypes, config and sidecars are those of the pruned student `source_dir`; its tensors that were not trained
    are copied; classes of the model's own are only with `code`. Adapters (`lora`: their settings) are merged, and kept
    in `adapter_dir`. Memory: a few blocks of 64 MiB. Raises CheckpointError when the two do not belong together,
    TrainingError on NaN or Inf.
    """
    source = Checkpoint.open(source_dir)
    held = checkpoint_folder.data_files(path, manifest)
    index = RankFileIndex(held, manifest["parameters"], quantities_of(manifest))
    helpers = manifest.get("helpers", ())  # older checkpoints have none
    exported = {name: shape for name, shape in index.shapes.items() if name not in helpers}
    adapters = None if lora is None else AdaptersOnDisk(source, lora, exported)
    trained = {} if adapters is not None else trained_tensors(source, exported, manifest["tied"])
    with files.atomic_dir(out_dir) as tmp:
        shutil.copyfile(source_dir / "config.json", tmp / "config.json")
        if not code and (config := without_own_classes(source.config)) != source.config:
            files.write_json(tmp / "config.json", config)
        copy_sidecars(source_dir, tmp, code=code)
        (tmp / CARD).write_text(card, encoding="utf-8")
        with RankFileReader(index) as reader:
            if adapters is None:
                write_weights(source, trained, partial(reader.fill, MASTER), tmp, max_shard_bytes)
            else:
                write_merged(source, adapters, reader, tmp, max_shard_bytes)
    if adapters is not None and adapter_dir is not None:
        with RankFileReader(index) as reader:
            adapters.write(adapter_dir, reader)


Fill = Callable[[ParameterRange, torch.Tensor], None]


def write_weights(
    source: Checkpoint, trained: Mapping[str, ParameterRange], fill: Fill, folder: Path, max_shard_bytes: int
) -> None:
    """Write the tensors of `source` into `folder`, those that were `trained` with the values that `fill` puts in.

    Raises TrainingError on NaN or Inf.
    """
    specs = {name: source.spec(name) for name in source.names}
    with ShardWriter(folder, specs, max_shard_bytes) as writer:
        for name in source.names:
            if name in trained:
                writer.add_blocks(name, _blocks(fill, trained[name], specs[name].shape, writer.dtype(name), name))
            else:
                writer.add_blocks(name, source.blocks(name, _BLOCK_BYTES))


def _blocks(
    fill: Fill, span: ParameterRange, shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> Iterator[torch.Tensor]:
    """Read a tensor of `shape` in blocks of whole rows. Raises TrainingError on a value that is not finite."""
    rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
    step = max(1, _BLOCK_BYTES // 4 // max(width, 1))
    for row in range(0, rows, step):
        count = min(step, rows - row)
        values = torch.empty(count * width)
        fill(ParameterRange(span.name, span.offset + row * width, count * width), values)
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(f"the distilled tensor {name} has NaN or infinite values; the student was not written")
        yield values.to(dtype).reshape(count, *shape[1:]) if shape else values.to(dtype).reshape(())


def export_run(path: Path, step: int | None, out: Path | None, reporter: Reporter) -> Path:
    """Write the student of checkpoint `step` (None: the newest that verifies) of a run folder; returns its folder.

    It takes no lock, so the run may go on. `out` is RUN/exported/step-N by default. Raises RunFolderError when there is
    no such run or checkpoint or `out` is in use, CheckpointError when the checkpoint asked for is damaged.
    """
    from kdscale.packaging.model_card import student_card

    run = RunFolder(path)
    if not run.config.exists():
        raise RunFolderError(f"{path} is not a run folder", expected="a run that has begun to distil")
    config = load_config(run.config)
    checkpoint, manifest = _find_checkpoint(run, step, reporter)
    target = out or run.path / "exported" / checkpoint.name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{target} is there already", hint="remove it, or choose another folder with --out")
    if manifest["fingerprint"]["student"]["config"] != sha256_file(run.pruned / "config.json"):
        raise CheckpointError(f"{run.pruned}", expected="the student that was distilled", got="another config.json")
    card = student_card(config, manifest, run.pruned)
    export_checkpoint(
        checkpoint, manifest, run.pruned, target, card=card, max_shard_bytes=config.prune.max_shard_bytes,
        code=config.teacher.trust_remote_code, lora=config.distill.lora,
        adapter_dir=target.with_name(f"{target.name}-adapter"),
    )  # fmt: skip
    reporter.say(f"student of step {checkpoint_folder.step_of(checkpoint)}: {target}")
    return target


def _find_checkpoint(run: RunFolder, step: int | None, reporter: Reporter) -> tuple[Path, Mapping[str, Any]]:
    """A checkpoint whose master weights verify, and its manifest."""
    checkpoints = checkpoint_folder.sealed_checkpoints(run.checkpoints)
    steps = [checkpoint_folder.step_of(path) for path in checkpoints]
    if not checkpoints or (step is not None and step not in steps):
        raise RunFolderError(
            f"{run.checkpoints} has no checkpoint" + (f" of step {step}" if step is not None else ""),
            expected=f"one of {', '.join(map(str, steps))}" if steps else "one that is sealed",
            hint="distill.keep_every keeps some of them" if steps else None,
        )
    if step is not None:
        checkpoints = [checkpoints[steps.index(step)]]
    for checkpoint in checkpoints:
        try:
            return checkpoint, checkpoint_folder.verify(checkpoint, weights_only=True)
        except CheckpointError as error:
            if checkpoint == checkpoints[-1]:
                raise
            reporter.say(f"{error.what}: {error.got}; skipped")
    raise AssertionError("unreachable: the last one is returned or raises")
