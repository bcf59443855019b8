"""Where text comes from: files, folders, globs, the text that ships with the package, and hub data sets by name.

A `.txt` file below 128 Ki characters is one document: blank lines in prose end paragraphs, not documents. A longer one
is cut at the first blank line after each 64 Ki. A `.jsonl` or `.jsonl.gz` file is one document per line, its text in
the configured field. Files are always read in sorted order, so that the same source gives the same documents in the
same order on every machine.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

from kdscale.config.data import SourceConfig
from kdscale.errors import ConfigError, DataError, ServiceError
from kdscale.files import sha256_file
from kdscale.weights.locate import hub_connection_errors, hub_name
from kdscale_launch.watchdog import beat

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
_BOM = b"\xef\xbb\xbf"
_TXT_DOCUMENT_CHARS = 1 << 16  # a .txt document has at least so many characters, and at most twice as many
_CUTS = (r"\n[ \t\r]*\n", r"\n", r"\s")  # where a .txt file may be cut, the best first
_LONGEST_LABEL = 200  # characters of it are kept
_BLOCK_BYTES, _MAX_RECORD_BYTES = 1 << 20, 64 << 20


@dataclass(frozen=True)
class Document:
    """One text; `source` is what the record's `source_field` says where it has one, else the file's name.

    `answers` are the spans of characters that the student learns to write, ascending; None: all of the text.
    """

    text: str
    source: str
    index: int  # within its SourceConfig
    answers: tuple[tuple[int, int], ...] | None = None


def builtin_names() -> list[str]:
    """Names that `builtin:NAME` accepts."""
    folder = resources.files("kdscale.data") / "builtin"
    return sorted(item.name.removesuffix(".jsonl.gz") for item in folder.iterdir() if item.name.endswith(".jsonl.gz"))


def read_documents(source: SourceConfig) -> Iterator[Document]:
    """Stream the documents of `source`.

    Raises DataError, with file and line, for a missing path, a folder or glob without text files, a file without
    documents, text that is not UTF-8, invalid JSON, a record whose field is missing or no string, and a damaged gzip
    file; for hub data sets ServiceError when the hub cannot be reached and ConfigError without the package `datasets`.
    """
    records = _read_hub(source) if source.path.startswith("hf:") else _read_files(source)
    for index, (text, label) in enumerate(records):
        beat()
        yield Document(text, label, index)


def is_local(source: SourceConfig) -> bool:
    """Whether the source is read from this machine's disk."""
    return not source.path.startswith("hf:")


def describe_source(source: SourceConfig) -> dict[str, Any]:
    """What identifies the source's content, for manifests: settings, and name, size and sha256 of every file."""
    facts: dict[str, Any] = {"path": source.path, "field": source.field, "weight": source.weight, "tag": source.tag}
    if source.source_field != "source":
        facts["source_field"] = source.source_field
    if not is_local(source):
        return {**facts, "split": source.split}
    files = source_files(source)
    return {**facts, "files": [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files]}


def cut_text_files(sources: Sequence[SourceConfig]) -> list[str]:
    """A notice for each source with `.txt` files that are too long for one document."""
    notices = []
    for source in sources:
        files = source_files(source) if is_local(source) else []
        cut = [file for file in files if file.name.endswith(".txt") and file.stat().st_size >= 2 * _TXT_DOCUMENT_CHARS]
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
    path = Path(source.path).expanduser()
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise DataError(f"data source {path} is of an unknown kind", expected=" or ".join(_SUFFIXES))
        return [path]
    if path.is_dir():
        paths = [item for item in path.rglob("*") if not _hidden(item.relative_to(path))]
    elif glob.has_magic(source.path):
        paths = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (absolute patterns too)
    else:
        name = hub_name(source.path)
        raise DataError(
            f"data source {source.path} does not exist",
            expected="a .txt, .jsonl or .jsonl.gz file, a folder or glob of these, builtin:NAME, or hf:NAME",
            hint=f"did you mean hf:{name}?" if name else "check the path, or put your text there",
        )
    files = sorted(item for item in paths if item.is_file() and item.name.endswith(_SUFFIXES))
    if not files:
        raise DataError(f"data source {source.path} holds no text", expected="files ending in " + ", ".join(_SUFFIXES))
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


def _read_files(source: SourceConfig) -> Iterator[tuple[str, str]]:
    for path in source_files(source):
        count = 0
        for record in _read_text(path) if path.name.endswith(".txt") else _read_jsonl(path, source):
            count += 1
            yield record
        if not count:
            raise DataError(f"{path} holds no document", expected="some text", got="an empty file")


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    """The documents of a .txt file; together they are its text, whose newlines stay as they are."""
    text = ""
    for block in _decoded_blocks(path):
        text += block
        while (end := _cut_position(text)) is not None:
            if text[:end].strip():
                yield text[:end], path.name
            text = text[end:]
    if text.strip():
        yield text, path.name


def _cut_position(text: str) -> int | None:
    """Where the document at the beginning of `text` ends; None while it is too short to say."""
    if len(text) < 2 * _TXT_DOCUMENT_CHARS:
        return None
    for pattern in _CUTS:
        match = re.compile(pattern).search(text, _TXT_DOCUMENT_CHARS, 2 * _TXT_DOCUMENT_CHARS)
        if match is not None:
            return match.end()
    return 2 * _TXT_DOCUMENT_CHARS


def _decoded_blocks(path: Path) -> Iterator[str]:
    decoder, lines = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as stream:
        raw = stream.read(_BLOCK_BYTES).removeprefix(_BOM)
        while True:
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, lines + error.object.count(b"\n", 0, error.start) + 1, error) from error
            if not raw:
                return
            lines += raw.count(b"\n")
            raw = stream.read(_BLOCK_BYTES)


def _read_jsonl(path: Path, source: SourceConfig) -> Iterator[tuple[str, str]]:
    number = 0
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:
            lines: IO[bytes] = stream
            # not `for raw in lines`: a file without newlines, or a small gzip file of one, would be read whole
            while raw := lines.readline(_MAX_RECORD_BYTES + 1):
                number += 1
                if len(raw) > _MAX_RECORD_BYTES:
                    expected = f"at most {_MAX_RECORD_BYTES:,} bytes a line"
                    hint = "is each record on a line of its own? Cut longer texts into several records"
                    raise DataError(f"{path} line {number} is too long", expected=expected, hint=hint)
                line = raw.removeprefix(_BOM) if number == 1 else raw
                if line.strip():
                    yield _parse_line(line, source, path, number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is a damaged gzip file", got=f"{error} (after line {number})", hint="copy or download it again"
        ) from error


def _parse_line(line: bytes, source: SourceConfig, path: Path, number: int) -> tuple[str, str]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from error
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise DataError(f"{path} line {number} is not valid JSON", got=str(error)) from error
    if not isinstance(record, dict):
        raise DataError(f"{path} line {number}", expected="a JSON object", got=type(record).__name__)
    return _text_of(record, source.field, f"{path} line {number}"), _label_of(record, source, path.name)


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        hint = "set `field` of this source"
        if isinstance(record.get("messages", record.get("conversations")), list):
            hint = "write the chat as one text with the teacher's chat template, into a field of its own"
        raise DataError(f"{where} has no field {field!r}", got=f"fields {sorted(record)}", hint=hint)
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}, field {field!r}", expected="a string", got=type(text).__name__)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        raise DataError(f"{where}, field {field!r} is not valid Unicode", got=str(error)) from error
    return text


def _label_of(record: dict[str, Any], source: SourceConfig, default: str) -> str:
    label = record.get(source.source_field) if source.source_field is not None else None
    if not isinstance(label, str) or not label:
        return default
    return label[:_LONGEST_LABEL].encode("utf-8", "replace").decode()  # JSON may escape half of a surrogate pair


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    with path.open("rb") as stream:
        encoding = "utf-16" if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
    return DataError(
        f"{path} line {line} is not UTF-8 text",
        got=f"byte 0x{error.object[error.start]:02x} ({error.reason})",
        hint=f"convert it, e.g. iconv -f {encoding} -t utf-8 {path}",
    )


def _read_hub(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """Text and label of each record of `hf:NAME` or `hf:NAME#CONFIG`, streamed through the package `datasets`."""
    name, _, config = source.path.removeprefix("hf:").partition("#")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"data source {source.path}", expected="the package `datasets`", hint="pip install kdscale[datasets]"
        ) from error
    unreachable: tuple[type[Exception], ...] = (OSError, RuntimeError, *hub_connection_errors())
    try:
        for number, record in enumerate(load_dataset(name, config or None, split=source.split, streaming=True)):
            yield _text_of(record, source.field, f"{source.path} record {number}"), _label_of(record, source, name)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"data source {source.path} does not exist under this name",
            got=str(error),
            hint="check its name, configuration (hf:NAME#CONFIG) and split; a private one needs `hf auth login`",
        ) from error
    except unreachable as error:
        raise ServiceError(
            f"data source {source.path} cannot be fetched",
            got=str(error),
            hint="check the network and HF_HUB_OFFLINE, or download it and name the files",
        ) from error
