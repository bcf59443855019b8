"""Parquet and Arrow files, a record in each row: through pyarrow, a few rows and only the wanted columns at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdscale.config.data import SourceConfig
from kdscale.data.readers.records import without_field
from kdscale.errors import DataError
from kdscale.files import read_json, safe_join
from kdscale.runtime.packages import require_packages

Record = tuple[str, dict[str, Any]]

_STATE, _PARTS = "state.json", "dataset_dict.json"  # of a folder that `save_to_disk` wrote: of a part, of several
_BATCH_ROWS = 256


def read_parquet(name: str, source: SourceConfig) -> Iterator[Record]:
    """The records of a Parquet file. Raises DataError for a damaged file and for one without the source's column."""
    with _explained(name, source):
        from pyarrow import parquet

        with parquet.ParquetFile(name) as file:
            columns = _wanted(file.schema_arrow.names, source, name)
            yield from _rows(name, file.iter_batches(_BATCH_ROWS, columns=columns), columns)


def read_arrow(name: str, source: SourceConfig) -> Iterator[Record]:
    """The records of an Arrow stream, memory-mapped. Raises DataError as `read_parquet` does."""
    with _explained(name, source):
        import pyarrow

        with pyarrow.memory_map(name) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            columns = _wanted(stream.schema.names, source, name)
            slices = (
                batch.slice(first, _BATCH_ROWS) for batch in stream for first in range(0, batch.num_rows, _BATCH_ROWS)
            )
            yield from _rows(name, slices, columns)


def saved_dataset_files(folder: Path, split: str) -> list[Path] | None:
    """The files, in order, of what `save_to_disk` wrote into `folder`; None where it has written nothing.

    Raises DataError for an unknown split, a damaged state, and rows that were selected and not written out.
    """
    if (folder / _PARTS).is_file():
        names = read_json(folder / _PARTS, DataError, expect=dict).get("splits")
        if not isinstance(names, list) or split not in names:
            raise DataError(
                f"{folder} has no split {split!r}",
                got=f"{_PARTS} names {names}"[:200],
                hint="set `split` of this source",
            )
        folder = safe_join(folder, split)
    if not (folder / _STATE).is_file():
        return None
    state = read_json(folder / _STATE, DataError, expect=dict)
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(
        isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files
    ):
        raise DataError(f"{folder / _STATE} is damaged", expected="_data_files with the name of each file")
    if state.get("_indices_data_files"):
        hint = "call flatten_indices() before save_to_disk()"
        raise DataError(f"{folder} keeps a selection of rows beside its data", hint=hint)
    paths = [safe_join(folder, file["filename"]) for file in files]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"{folder} is incomplete", expected=f"the files that {_STATE} names", got=f"no {absent[0]}")
    return paths


def _wanted(columns: list[str], source: SourceConfig, name: str) -> list[str]:
    if source.field_name not in columns:
        raise without_field(name, "column", columns, source)
    return [name for name in columns if name in (source.field_name, source.source_field)]


def _rows(name: str, batches: Iterable[Any], columns: list[str]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for record in batch.select(columns).to_pylist():
            number += 1
            yield f"{name} row {number}", record


@contextmanager
def _explained(name: str, source: SourceConfig) -> Iterator[None]:
    """What pyarrow raises as a DataError; a missing pyarrow as a ConfigError."""
    require_packages(f"data source {source.path}", ("pyarrow",), "datasets")
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name} is damaged, or not what its name says", got=text, hint="copy or download it again"
        ) from error
