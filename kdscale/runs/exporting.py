"""The student of any checkpoint of a run, at any time: `kdscale export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdscale.config import load_config
from kdscale.errors import CheckpointError, RunFolderError
from kdscale.files import sha256_file
from kdscale.progress import Reporter
from kdscale.runs.folder import RunFolder


def export_run(path: Path, step: int | None, out: Path | None, reporter: Reporter) -> Path:
    """Write the student of checkpoint `step` (the newest that verifies) of a run folder; returns where.

    Takes no lock: the run may go on meanwhile. `out` is RUN/exported/step-N unless given. Raises RunFolderError when
    there is no such run or checkpoint or `out` is in use, CheckpointError when the checkpoint asked for is damaged.
    """
    from kdscale.distill import state
    from kdscale.distill.export import card_facts, export_checkpoint, model_card

    run = RunFolder(path)
    if not run.config.exists():
        raise RunFolderError(f"{path} is not a run folder", expected="a run that has begun to distil")
    config = load_config(run.config)
    checkpoint, manifest = _choose(run, step, reporter)
    target = out or run.path / "exported" / checkpoint.name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{target} is there already", hint="remove it, or choose another folder with --out")
    if manifest["fingerprint"]["student"]["config"] != sha256_file(run.pruned / "config.json"):
        raise CheckpointError(f"{run.pruned}", expected="the student that was distilled", got="another config.json")
    card = model_card(card_facts(config, manifest))
    limit = config.prune.max_shard_bytes
    export_checkpoint(checkpoint, manifest, run.pruned, target, card=card, max_shard_bytes=limit)
    reporter.say(f"student of step {state.step_of(checkpoint)}: {target}")
    return target


def _choose(run: RunFolder, step: int | None, reporter: Reporter) -> tuple[Path, Mapping[str, Any]]:
    """The checkpoint and its manifest, its master weights verified."""
    from kdscale.distill import state

    there = state.complete_steps(run.checkpoints)
    steps = [state.step_of(item) for item in there]
    if not there or (step is not None and step not in steps):
        raise RunFolderError(
            f"{run.checkpoints} has no checkpoint" + (f" of step {step}" if step is not None else ""),
            expected=f"one of {', '.join(map(str, steps))}" if steps else "one that is sealed",
            hint="distill.keep_every keeps some for ever" if steps else None,
        )
    if step is not None:
        there = [there[steps.index(step)]]
    for checkpoint in there:
        try:
            return checkpoint, state.verify(checkpoint, weights_only=True)
        except CheckpointError as error:
            if checkpoint == there[-1]:
                raise
            reporter.say(f"{error.what}: {error.got}; passed over")
    raise AssertionError("unreachable: the last one is returned or raises")
