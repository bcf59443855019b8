"""Digests of files and folders, by which a stage knows that its inputs have not changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

_WHOLE_FILE_BYTES = 1 << 22
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def digest_file(path: Path) -> str:
    """A digest that notices any ordinary change without reading 16 GB: size, both ends and 64 samples between.

    Files up to 4 MiB are read whole.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= _WHOLE_FILE_BYTES:
            digest.update(stream.read())
        else:
            for index in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def digest_tree(path: Path, only: Sequence[str] | None = None) -> dict[str, str]:
    """Digest of every file under `path` (or of `path` itself), by relative name; `only`: of what these globs match."""
    if path.is_file():
        return {path.name: digest_file(path)}
    items = path.rglob("*") if only is None else {item for pattern in only for item in path.glob(pattern)}
    return {str(item.relative_to(path)): digest_file(item) for item in sorted(items) if item.is_file()}
