"""Checkpoint folders that are complete or absent: one file per rank, and a manifest of hashes that is written last.

All ranks write into the same hidden temporary folder; then rank 0 writes the manifest and gives the folder its name
(it seals the checkpoint). A folder without a valid manifest is never loaded, whatever was killed and when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdscale import files
from kdscale.config.load import config_differences
from kdscale.errors import CheckpointError, RunFolderError
from kdscale.runtime.ranks import gather, on_main, rank, world_size

MANIFEST = "manifest.json"
FORMAT = 2

_PARTIAL = ".partial-"
_DAMAGED = "damaged-"


def step_dir(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is, or will be."""
    return folder / f"step-{step:08d}"


def partial_dir(folder: Path, step: int) -> Path:
    """Where the files of a checkpoint are written. `files.remove_leftovers` removes what a killed run left there."""
    return folder / f"{_PARTIAL}{step_dir(folder, step).name}"


def rank_file(number: int) -> str:
    """The name of a rank's file."""
    return f"rank-{number:05d}.safetensors"


def seal(folder: Path, step: int, facts: Mapping[str, Any]) -> Path:
    """Turn the finished files of a step into a checkpoint: write the manifest, then rename. `facts` go into it."""
    final, tmp = step_dir(folder, step), partial_dir(folder, step)
    manifest = {"format": FORMAT, "step": step, **facts}
    files.write_json(tmp / MANIFEST, {**manifest, "sha256": files.sha256_json(manifest)})
    files.fsync_dir(tmp)
    _remove(final)  # exists only when it did not verify, or when the same step is saved again
    tmp.replace(final)
    files.fsync_dir(folder)
    return final


def rotate(folder: Path, keep: int, keep_every: int | None) -> None:
    """Remove all checkpoints except the newest `keep` and those of every `keep_every`-th step.

    Damaged ones that were set aside are removed as soon as there are `keep` good ones.
    """
    sealed = sealed_checkpoints(folder)
    for old in sealed[keep:]:
        if keep_every is None or step_of(old) % keep_every:
            _remove(old)
    if len(sealed) >= keep:
        for damaged in folder.glob(f"{_DAMAGED}*"):
            _remove(damaged)


def _set_aside(damaged: Sequence[Path]) -> None:
    """Rename damaged checkpoints: otherwise each would count as one to keep, and push out the good one before it."""
    for path in damaged:
        aside = path.with_name(f"{_DAMAGED}{path.name}")
        _remove(aside)
        path.replace(aside)
        files.fsync_dir(path.parent)


def _remove(checkpoint: Path) -> None:
    """Rename, then remove: a removal that is cut short must not leave a folder that looks like a checkpoint."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f"{_PARTIAL}old-{checkpoint.name}")
        files.remove_tree(aside)
        checkpoint.replace(aside)
        files.remove_tree(aside)


def sealed_checkpoints(folder: Path) -> list[Path]:
    """Step folders that have a manifest, newest first; their hashes are not checked."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MANIFEST}")), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


@dataclass(frozen=True)
class LatestCheckpoint:
    """The newest checkpoint that verified, or no path; `notes` name the newer ones that were skipped, and why."""

    path: Path | None
    manifest: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        """The number of steps it was saved after; 0 without one."""
        return int(self.manifest["step"]) if self.path is not None else 0


def find_latest(folder: Path, fingerprint: Mapping[str, Any]) -> LatestCheckpoint:
    """Find the newest checkpoint whose files match its manifest. A collective call; each rank hashes some of the files.

    Damaged ones are renamed to damaged-…. Only rank 0's `fingerprint` counts. Raises RunFolderError on every rank when
    the checkpoint belongs to another run: it is neither used nor overwritten.
    """
    names, notes = on_main(lambda: _candidates(folder))
    damaged: list[Path] = []
    latest: Path | None = None
    manifest: dict[str, Any] = {}
    for path in (folder / name for name in names):
        problems = [problem for problem in gather(_problem(path)) if problem]
        if not problems:
            latest, manifest = path, read_manifest(path)
            on_main(partial(_refuse_other_run, path, manifest["fingerprint"], fingerprint))
            break
        damaged.append(path)
        notes.append(f"{problems[0]}; skipped and renamed to {_DAMAGED}{path.name}")
    on_main(partial(_set_aside, damaged))
    return LatestCheckpoint(latest, manifest, tuple(notes))


def _candidates(folder: Path) -> tuple[list[str], list[str]]:
    """(the names of checkpoints, newest first; notes about step folders that are none)."""
    if not folder.is_dir():
        return [], []
    files.remove_leftovers(folder)
    sealed = sealed_checkpoints(folder)
    notes = [f"{path}: no manifest, skipped" for path in sorted(set(folder.glob("step-*")) - set(sealed))]
    return [path.name for path in sealed], notes


def _problem(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint that this rank hashes, or None."""
    try:
        verify(path, first=rank(), stride=world_size())
    except CheckpointError as error:
        return f"{error.what}: {error.got}"
    return None


def _refuse_other_run(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if differences := config_differences(dict(old), dict(new)):
        raise RunFolderError(
            f"{path} is a checkpoint of another run",
            expected="the same settings, data, teacher and student",
            got="; ".join(map(str, differences[:8])),
            hint=f"choose another run folder, or remove {path.parent} to distil from the beginning",
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint folder. Raises CheckpointError when it is damaged or of another format."""
    manifest = files.read_json(path / MANIFEST, CheckpointError, expect=dict)
    version = manifest.get("format")
    if version != FORMAT:
        raise CheckpointError(
            f"{path}", expected=f"manifest format {FORMAT}", got=f"manifest format {str(version)[:80]}"
        )
    written = manifest.pop("sha256", None)
    try:
        unchanged = written == files.sha256_json(manifest)
    except ValueError:  # NaN, which kdscale never writes
        unchanged = False
    if not unchanged or not _is_complete(manifest):
        raise CheckpointError(f"{path}", expected="the manifest that was written", got=f"{MANIFEST} was changed")
    return dict(manifest)


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest with the right hash, which anybody can compute, holds what is read of it."""
    entries = manifest.get("files")
    shapes = {"step": int, "fingerprint": dict, "state": dict, "parameters": dict, "tied": dict, "adam_step": int}
    return (
        all(type(manifest.get(name)) is expected for name, expected in shapes.items())
        and isinstance(entries, dict)
        and all(
            isinstance(entry, dict)
            and all(type(entry.get(f"{part}bytes")) is int for part in ("", "weights_"))
            and all(isinstance(entry.get(f"{part}sha256"), str) for part in ("", "weights_"))
            for entry in entries.values()
        )
    )


def data_files(path: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The ranks' files that a manifest lists."""
    return [files.safe_join(path, name) for name in manifest["files"]]


def verify(path: Path, *, first: int = 0, stride: int = 1, weights_only: bool = False) -> dict[str, Any]:
    """Compare size and hash of every `stride`-th file from `first` on with the manifest; returns the manifest.

    `weights_only`: hash no further than the last master weight of each file. Raises CheckpointError.
    """
    manifest = read_manifest(path)
    for file in data_files(path, manifest)[first::stride]:
        entry = manifest["files"][file.name]
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path}", expected=f"{file.name} of {entry['bytes']} bytes", got=f"{file.name} is incomplete"
            )
        size, digest = ("weights_bytes", "weights_sha256") if weights_only else ("bytes", "sha256")
        if files.sha256_file(file, entry[size]) != entry[digest]:
            raise CheckpointError(f"{path}", expected="the bytes that were written", got=f"{file.name} was changed")
    return manifest
