"""Checkpoints that are whole or absent: step folders with a manifest of hashes, written last.

Every rank writes into the same hidden temporary folder; rank 0 hashes what is there, writes manifest.json, renames. A
folder without a valid manifest is never loaded, whatever was killed and when.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdscale import files
from kdscale.config import config_differences
from kdscale.dist import barrier, is_main, rank
from kdscale.errors import CheckpointError, RunFolderError

MANIFEST = "manifest.json"
FORMAT = 1
_PARTIAL = ".partial-"


def rng_state() -> dict[str, Any]:
    """The state of every generator this process draws from, as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": cuda,
        "python": [version, list(internal), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(pos), int(has_gauss), float(cached)],
    }


def restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_decode(item) for item in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), pos, has_gauss, cached))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())


def step_dir(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(
    folder: Path,
    step: int,
    *,
    write: Callable[[Path], None],
    state: dict[str, Any],
    fingerprint: dict[str, Any],
    keep: int,
) -> Path:
    """Save one checkpoint; a collective call.

    `write(tmp)` writes this rank's share of the engine's state under `tmp` and returns only when every rank's share is
    written. `state` is this rank's own JSON-able state. Older checkpoints than the newest `keep` are then removed.
    """
    final = step_dir(folder, step)
    tmp = folder / f"{_PARTIAL}{final.name}"
    with files.explain_os_errors(final):
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            files.remove_tree(tmp)
            tmp.mkdir()
        barrier()
        write(tmp)
        files.write_json(tmp / f"rank-{rank():05d}.json", {**state, "rng": rng_state()})
        barrier()
        if is_main():
            _seal(tmp, final, step, fingerprint)
            for old in complete_steps(folder)[keep:]:
                files.remove_tree(old)
        barrier()
    return final


def _seal(tmp: Path, final: Path, step: int, fingerprint: dict[str, Any]) -> None:
    found = sorted(item for item in tmp.rglob("*") if item.is_file())
    for item in found:
        files.fsync_file(item)
    hashes = {
        item.relative_to(tmp).as_posix(): {"sha256": files.sha256_file(item), "bytes": item.stat().st_size}
        for item in found
    }
    manifest = {"format": FORMAT, "step": step, "fingerprint": fingerprint, "files": hashes}
    files.write_json(tmp / MANIFEST, manifest)
    for inner in [tmp, *(item for item in tmp.rglob("*") if item.is_dir())]:
        files.fsync_dir(inner)
    files.remove_tree(final)  # only there when it did not verify, or when the same step is saved again
    tmp.replace(final)
    files.fsync_dir(final.parent)


def complete_steps(folder: Path) -> list[Path]:
    """Step folders that have a manifest, newest first; their hashes are not looked at."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MANIFEST}")), reverse=True)


@dataclass(frozen=True)
class Found:
    """A checkpoint that verified; `notes` say what was passed over on the way to it."""

    path: Path | None
    step: int
    notes: tuple[str, ...]


def find(folder: Path, fingerprint: dict[str, Any]) -> Found:
    """The newest checkpoint whose files match its manifest; path None when there is none.

    Raises RunFolderError when a whole checkpoint belongs to another run: it is neither used nor overwritten.
    """
    notes: list[str] = []
    if folder.is_dir():
        files.remove_leftovers(folder)
        whole = complete_steps(folder)
        notes += [f"{torn}: no manifest, passed over" for torn in sorted(set(folder.glob("step-*")) - set(whole))]
        for path in whole:
            try:
                manifest = verify(path)
            except CheckpointError as error:
                notes.append(f"{error.what}: {error.got}; passed over")
                continue
            if differences := config_differences(manifest["fingerprint"], fingerprint):
                raise RunFolderError(
                    f"{path} is a checkpoint of another run",
                    expected="the same settings, data, teacher and student",
                    got="; ".join(differences[:8]),
                    hint=f"choose another run folder, or remove {folder} to distil from the beginning",
                )
            return Found(path, int(manifest["step"]), tuple(notes))
    return Found(None, 0, tuple(notes))


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file's size and hash was compared with it. Raises CheckpointError."""
    manifest = files.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}", expected=f"manifest format {FORMAT}", got="another manifest format")
    for name, about in manifest["files"].items():
        file = files.safe_join(path, name)
        if not file.is_file() or file.stat().st_size != about["bytes"]:
            raise CheckpointError(f"{path}", expected=f"{name} of {about['bytes']} bytes", got=f"{name} is incomplete")
        if files.sha256_file(file) != about["sha256"]:
            raise CheckpointError(f"{path}", expected="the bytes that were written", got=f"{name} was changed")
    return manifest


def read_rank_state(path: Path) -> dict[str, Any]:
    state = files.read_json(path / f"rank-{rank():05d}.json")
    assert isinstance(state, dict)
    return state
