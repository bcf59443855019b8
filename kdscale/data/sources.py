"""Where text comes from: files, folders, globs, the text that ships with the package, and hub data sets by name.

config.data.READERS has the formats, kdscale/data/readers/ a file for each. Files are always read in sorted order, so
that the same source gives the same documents in the same order on every machine.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np

from kdscale.config.data import READERS, Reader, SourceConfig, file_suffixes
from kdscale.data.readers.arrow import saved_dataset_files
from kdscale.data.readers.chat import ChatTemplate
from kdscale.data.readers.records import checked_text, class_of, content_of, label_of
from kdscale.data.readers.text import DOCUMENT_CHARS
from kdscale.errors import DataError
from kdscale.files import sha256_file
from kdscale.weights.locate import hub_name
from kdscale_launch.watchdog import beat


@dataclass(frozen=True)
class Document:
    """One text; `source` is what the record's `source_field` says where it has one, else the file's name.

    `answers` are the spans of characters that the student learns to write, ascending; None: all of the text.
    `ids` (int64) takes the place of the text where its tokens are all that is known. `part_of`: the content of the
    document that it is a sentence of, which decides on which side it is held out. `class_`: what the record's
    `class_field` says.
    """

    text: str
    source: str
    index: int  # within its SourceConfig
    answers: tuple[tuple[int, int], ...] | None = None
    ids: np.ndarray | None = None
    part_of: bytes | None = None
    class_: int | str | None = None

    @property
    def brings_own_ends(self) -> bool:
        """Whether it may have what begins and ends a document already: from a chat template, or as token ids."""
        return self.answers is not None or self.ids is not None

    @property
    def size(self) -> int:
        """Bytes of its content."""
        return len(self.content)

    @property
    def content(self) -> bytes:
        """What tells it from other documents: its text in UTF-8, or its token ids."""
        return self.text.encode("utf-8") if self.ids is None else self.ids.tobytes()


def builtin_names() -> list[str]:
    """Names that `builtin:NAME` accepts."""
    folder = resources.files("kdscale.data") / "builtin"
    return sorted(item.name.removesuffix(".jsonl.gz") for item in folder.iterdir() if item.name.endswith(".jsonl.gz"))


def read_documents(source: SourceConfig, chat: ChatTemplate | None = None) -> Iterator[Document]:
    """Stream the documents of `source`; `chat` makes texts of conversations.

    Raises DataError, with file and line, for a missing path, a folder or glob without text files, a file without
    documents, text that is not UTF-8, invalid JSON, a record whose field is missing or no string, a conversation that
    cannot be used, and a damaged file; for hub data sets ServiceError when the hub cannot be reached; ConfigError
    without the package that reads the format.
    """
    for index, (where, content, default_label) in enumerate(_contents(source)):
        beat()
        label = label_of(content, source, default_label) if isinstance(content, dict) else default_label
        if isinstance(content, np.ndarray):
            yield Document("", label, index, ids=content)
        elif isinstance(content, str):
            yield Document(content, label, index)
        elif not source.chat:
            text = checked_text(content_of(content, source, where), f"{where}, field {source.field_name!r}")
            yield Document(text, label, index, class_=class_of(content, source, where))
        else:
            assert chat is not None
            conversation = chat.chat(content_of(content, source, where), where)
            yield Document(conversation.text, label, index, conversation.answers)


def _contents(source: SourceConfig) -> Iterator[tuple[str, Any, str]]:
    """Where each text, record or token ids of a source are, they themselves, and a label for those that have none."""
    if (hub := reader_of_scheme(source)) is not None:
        name = source.path.removeprefix(hub.scheme or "").partition("#")[0]
        for where, content in resolve_name(hub.read)(source.path, source):
            yield where, content, name
        return
    for path in source_files(source):
        count = 0
        for where, content in resolve_name(_reader_of(path).read)(str(path), source):
            count += 1
            yield where, content, path.name
        if not count:
            raise DataError(f"{path} holds no document", expected="some text", got="an empty file")


def reader_of_scheme(source: SourceConfig) -> Reader | None:
    """The reader that the beginning of the source's path names; None for files."""
    return next((r for r in READERS.values() if r.scheme is not None and source.path.startswith(r.scheme)), None)


def _reader_of(path: Path) -> Reader:
    return next(reader for reader in READERS.values() if reader.claims(path.name))


def is_local(source: SourceConfig) -> bool:
    """Whether the source is read from this machine's disk."""
    return reader_of_scheme(source) is None


def describe_source(source: SourceConfig) -> dict[str, Any]:
    """What identifies the source's content, for manifests: settings, and name, size and sha256 of every file."""
    facts: dict[str, Any] = {
        "path": source.path, "field": source.field_name, "chat": source.chat, "weight": source.weight,
        "tag": source.tag,
    }  # fmt: skip
    if source.source_field != "source":
        facts["source_field"] = source.source_field
    if source.class_field is not None:
        facts["class_field"] = source.class_field
    if not is_local(source):
        return {**facts, "split": source.split}
    files = [file for path in source_files(source) for file in (path, *_companion(path))]
    return {**facts, "files": [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files]}


def _companion(path: Path) -> list[Path]:
    """The file beside `path` that belongs to it, where it has one."""
    suffix = _reader_of(path).companion
    beside = path.with_suffix(suffix) if suffix else path
    return [beside] if beside != path and beside.is_file() else []


def cut_text_files(sources: Sequence[SourceConfig]) -> list[str]:
    """A notice for each source with `.txt` files that are too long for one document."""
    notices = []
    for source in sources:
        files = source_files(source) if is_local(source) else []
        cut = [file for file in files if file.name.endswith(".txt") and file.stat().st_size >= 2 * DOCUMENT_CHARS]
        if cut:
            notices.append(
                f"  note: {source.path}: {len(cut)} .txt file(s) of 128 KiB or more are cut into documents of about "
                "64 Ki characters, at blank lines where there are some; .jsonl keeps documents of any length whole"
            )
    return notices


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a local source, sorted. Raises DataError when there is none."""
    if source.path.startswith("builtin:"):
        return [_builtin_file(source.path.removeprefix("builtin:"))]
    path, suffixes = Path(source.path).expanduser(), file_suffixes()
    if path.is_file():
        if not path.name.endswith(suffixes):
            raise DataError(f"data source {path} is of an unknown kind", expected=" or ".join(suffixes))
        return [path]
    if path.is_dir():
        if (saved := saved_dataset_files(path, source.split)) is not None:
            return saved
        paths = [item for item in path.rglob("*") if not _hidden(item.relative_to(path))]
    elif glob.has_magic(source.path):
        paths = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (absolute patterns too)
    else:
        name = hub_name(source.path)
        raise DataError(
            f"data source {source.path} does not exist",
            expected=f"a file ({', '.join(suffixes)}), a folder or glob of these, builtin:NAME, or hf:NAME",
            hint=f"did you mean hf:{name}?" if name else "check the path, or put your text there",
        )
    files = sorted(item for item in paths if item.is_file() and item.name.endswith(suffixes))
    if not files:
        raise DataError(f"data source {source.path} holds no text", expected="files ending in " + ", ".join(suffixes))
    return files


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _builtin_file(name: str) -> Path:
    if name not in builtin_names():
        raise DataError(f"data source builtin:{name} does not exist", expected=f"one of {', '.join(builtin_names())}")
    file = resources.files("kdscale.data") / "builtin" / f"{name}.jsonl.gz"
    if not isinstance(file, Path):
        raise DataError(f"builtin:{name} cannot be read from a zipped package", hint="install kdscale unzipped")
    return file
