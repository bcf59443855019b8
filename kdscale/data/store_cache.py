"""Token stores that runs share: a folder for each combination of text, tokenizer and settings, named by their digest.

    <cache>/<digest>/          a token store, and digests.json with the sha256 of each of its files

An entry appears by one rename and never changes, so any number of runs may use the cache at once. Files are hard links
where the file system allows it: a store that a run and the cache hold takes its place on the disk once. Any entry may
be deleted at any time.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers

from kdscale.data.store_builder import DocumentFormat
from kdscale.data.store_format import STORE_VERSION, name_in_blend, read_store_manifest
from kdscale.errors import KdscaleError
from kdscale.files import (
    atomic_dir,
    fsync_dir,
    fsync_file,
    read_json,
    safe_join,
    sha256_file,
    sha256_json,
    write_json,
)
from kdscale.runtime.progress import Reporter

FOLDER_VARIABLE = "KDSCALE_CACHE"
_DIGESTS = "digests.json"
_SETTINGS = ("heldout_fraction", "deduplicate", "chat_template_sha256", "leaks_looked_for")  # of a description
_NOT_IN_FILES = ("path", "weight", "tag")  # what is said of a source and changes no file of the store
_ABANDONED_SECONDS = 86_400  # after which what a killed run left half written is deleted


def cache_folder() -> Path:
    """Where stores are shared: under $KDSCALE_CACHE, or the user's cache folder."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdscale"
    return (Path(chosen) if chosen else user) / "tokens"


class StoreCache:
    """The shared stores under `folder`. A cache that cannot be read or written is reported, and the run goes on."""

    def __init__(self, folder: Path):
        self._folder = folder

    def key(self, description: dict[str, Any], form: DocumentFormat, tokenizer_sha256: str) -> str | None:
        """The digest of everything that a store depends on; None for text of a hub data set, which may change."""
        sides = [description.get(name, []) for name in ("sources", "heldout_sources", "leak_sources")]
        if any("files" not in source for side in sides for source in side):
            return None
        # a file's name is a label of its documents; its folder is not. Weights and tags are in the manifest alone
        text = [[{k: v for k, v in source.items() if k not in _NOT_IN_FILES} for source in side] for side in sides]
        settings: list[Any] = [form.eos_id, form.vocab_size, form.special, form.max_tokens]
        settings += [description.get(name) for name in _SETTINGS]
        if form.encoder is not None or "sentences" in description:
            settings.append([form.encoder and asdict(form.encoder), description.get("sentences", False)])
        if form.classes:
            settings.append(form.classes)
        settings.append(_read_of_a_blend(description))
        return sha256_json([STORE_VERSION, tokenizers.__version__, tokenizer_sha256, settings, text])

    def take(self, key: str | None, folder: Path, description: dict[str, Any], reporter: Reporter) -> bool:
        """Put the store `key` into `folder`; returns whether there is one. A damaged one is deleted."""
        if key is None:
            return False
        entry = self._folder / key
        try:
            if not (entry / _DIGESTS).is_file():
                return False
            digests = read_json(entry / _DIGESTS, expect=dict)
            manifest = _checked_manifest(entry, digests)
        except (OSError, KdscaleError) as error:
            reason = " ".join(str(error).split())[:200]
            reporter.say(f"  note: the tokenised text in {entry} is damaged ({reason}) and is made again")
            shutil.rmtree(entry, ignore_errors=True)
            return False
        with atomic_dir(folder) as tmp:
            _link_files(entry, tmp, [name for name in digests if name != "manifest.json"])
            write_json(tmp / "manifest.json", {**manifest, **description})
        reporter.say(f"  the same text was tokenised before: taken from {entry}")
        return True

    def put(self, key: str | None, folder: Path, reporter: Reporter) -> None:
        """Share the finished store in `folder` as `key`. Of two runs that do so at once, the first one's stays."""
        if key is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".partial-*"):
                if leftover.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    shutil.rmtree(leftover)
            with TemporaryDirectory(prefix=".partial-", dir=self._folder) as tmp:
                self._fill(Path(tmp) / key, folder)
                if not (self._folder / key).exists():
                    (Path(tmp) / key).rename(self._folder / key)
                    fsync_dir(self._folder)
        except (OSError, KdscaleError) as error:
            if not _is_file(self._folder / key / _DIGESTS):  # else another run was faster
                reporter.say(f"  note: the tokenised text is not shared with other runs: {error}")

    @staticmethod
    def _fill(entry: Path, folder: Path) -> None:
        names = sorted(str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file())
        entry.mkdir()
        _link_files(folder, entry, names)
        write_json(entry / _DIGESTS, {name: sha256_file(entry / name) for name in names})


def _read_of_a_blend(description: dict[str, Any]) -> Any:
    """What a blend's budget of tokens leaves unread; None where everything is read."""
    blend = description.get("blend")
    if blend is None or blend["tokens"] is None:
        return None
    return [blend, [name_in_blend(source) for source in description["sources"]]]


def _checked_manifest(entry: Path, digests: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an entry whose files are those that were written.

    Raises CheckpointError for a name outside the entry, OSError for another file, DataError for a damaged manifest.
    """
    for name, digest in digests.items():
        file = safe_join(entry, name)
        if not _is_file(file) or sha256_file(file) != digest:
            raise OSError(f"{name[:80]!r} is not the file that was written")
    manifest = read_store_manifest(entry)
    if missing := {"manifest.json", *manifest["files"]} - set(digests):
        raise OSError(f"{min(missing)[:80]!r} has no digest")
    return manifest


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that may not be entered
        return False


def _link_files(source: Path, target: Path, names: list[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / name, target / name)
            fsync_file(target / name)
