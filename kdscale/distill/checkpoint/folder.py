"""Checkpoint folders that are whole or absent: a file a rank, and a manifest of hashes that is written last.

All ranks write into the same hidden temporary folder; rank 0 writes the manifest and gives the folder its name. A
folder without a manifest in order is never loaded, whatever was killed and when.
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
    return folder / f"step-{step:08d}"


def partial_dir(folder: Path, step: int) -> Path:
    """Where the files of a checkpoint are written; `files.remove_leftovers` removes what a killed run left."""
    return folder / f"{_PARTIAL}{step_dir(folder, step).name}"


def rank_file(number: int) -> str:
    return f"rank-{number:05d}.safetensors"


def seal(folder: Path, step: int, facts: Mapping[str, Any]) -> Path:
    """Turn the finished files of a step into a checkpoint: manifest, then name. `facts` are the manifest's own part."""
    final, tmp = step_dir(folder, step), partial_dir(folder, step)
    manifest = {"format": FORMAT, "step": step, **facts}
    files.write_json(tmp / MANIFEST, {**manifest, "sha256": files.sha256_json(manifest)})
    files.fsync_dir(tmp)
    _remove(final)  # only there when it did not verify, or when the same step is saved again
    tmp.replace(final)
    files.fsync_dir(folder)
    return final


def rotate(folder: Path, keep: int, keep_every: int | None) -> None:
    """Remove checkpoints but the newest `keep` and those of every `keep_every`-th step.

    What was set aside as damaged goes when `keep` others are there.
    """
    whole = sealed_checkpoints(folder)
    for old in whole[keep:]:
        if keep_every is None or step_of(old) % keep_every:
            _remove(old)
    if len(whole) >= keep:
        for damaged in folder.glob(f"{_DAMAGED}*"):
            _remove(damaged)


def _set_aside(damaged: Sequence[Path]) -> None:
    """Out of the sequence: it would count as one of those to keep, and push out the good one before it."""
    for path in damaged:
        aside = path.with_name(f"{_DAMAGED}{path.name}")
        _remove(aside)
        path.replace(aside)
        files.fsync_dir(path.parent)


def _remove(checkpoint: Path) -> None:
    """Not in place: a removal that is cut short must not leave a folder that looks like a checkpoint."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f"{_PARTIAL}old-{checkpoint.name}")
        files.remove_tree(aside)
        checkpoint.replace(aside)
        files.remove_tree(aside)


def sealed_checkpoints(folder: Path) -> list[Path]:
    """Step folders that have a manifest, newest first; their hashes are not looked at."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MANIFEST}")), reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


@dataclass(frozen=True)
class LatestCheckpoint:
    """A checkpoint that verified and its manifest; `notes` say what was passed over on the way to it."""

    path: Path | None
    manifest: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        return int(self.manifest["step"]) if self.path is not None else 0


def find_latest(folder: Path, fingerprint: Mapping[str, Any]) -> LatestCheckpoint:
    """The newest checkpoint whose files match its manifest; path None when there is none. A collective call.

    Those passed over are renamed to damaged-…. The ranks share the hashing. `fingerprint` is rank 0's. Raises
    RunFolderError on every rank when a whole checkpoint belongs to another run: it is neither used nor overwritten.
    """
    candidates, notes = on_main(lambda: _candidates(folder))
    damaged: list[Path] = []
    found: Path | None = None
    manifest: dict[str, Any] = {}
    for path in candidates:
        problems = [problem for problem in gather(_problem(path)) if problem]
        if not problems:
            found, manifest = path, read_manifest(path)
            on_main(partial(_refuse_other_run, path, manifest["fingerprint"], fingerprint))
            break
        damaged.append(path)
        notes.append(f"{problems[0]}; passed over and renamed to {_DAMAGED}{path.name}")
    on_main(partial(_set_aside, damaged))
    return LatestCheckpoint(found, manifest, tuple(notes))


def _candidates(folder: Path) -> tuple[list[Path], list[str]]:
    if not folder.is_dir():
        return [], []
    files.remove_leftovers(folder)
    whole = sealed_checkpoints(folder)
    return whole, [f"{torn}: no manifest, passed over" for torn in sorted(set(folder.glob("step-*")) - set(whole))]


def _problem(path: Path) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        verify(path, part=rank(), parts=world_size())
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
    manifest = files.read_json(path / MANIFEST, CheckpointError)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}", expected=f"manifest format {FORMAT}", got=f"manifest format {found}")
    if manifest.pop("sha256", None) != files.sha256_json(manifest):
        raise CheckpointError(f"{path}", expected="the manifest that was written", got=f"{MANIFEST} was changed")
    return dict(manifest)


def data_files(path: Path, manifest: Mapping[str, Any]) -> list[Path]:
    return [files.safe_join(path, name) for name in manifest["files"]]


def verify(path: Path, *, part: int = 0, parts: int = 1, weights_only: bool = False) -> dict[str, Any]:
    """The manifest, after size and hash of every `parts`-th file from `part` on were compared with it.

    `weights_only`: hash no further than the last master weight of each file. Raises CheckpointError.
    """
    manifest = read_manifest(path)
    for file in data_files(path, manifest)[part::parts]:
        about = manifest["files"][file.name]
        if not file.is_file() or file.stat().st_size != about["bytes"]:
            raise CheckpointError(
                f"{path}", expected=f"{file.name} of {about['bytes']} bytes", got=f"{file.name} is incomplete"
            )
        size, digest = ("weights_bytes", "weights_sha256") if weights_only else ("bytes", "sha256")
        if files.sha256_file(file, about[size]) != about[digest]:
            raise CheckpointError(f"{path}", expected="the bytes that were written", got=f"{file.name} was changed")
    return manifest
