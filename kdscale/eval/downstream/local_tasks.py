"""Tasks in files of the user's own, in lm-evaluation-harness's YAML format, with their items beside them.

The harness imports Python that a task file names and reads files wherever it points. Here a task file is data: no
tags, no functions, no files outside its folder. Its items are read here too, so that nothing is downloaded or cached.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdscale.config.fields import explain_errors
from kdscale.config.load import parse_yaml
from kdscale.errors import ConfigError, DataError, KdscaleError
from kdscale.eval.downstream.task_settings import TaskSettings
from kdscale.files import parse_json, read_text, safe_join

BUILTIN = "builtin"
_BUILTIN_FOLDER = Path(__file__).parent / BUILTIN
_SUFFIXES = (".yaml", ".yml")
_MOST_ITEMS = 1_000_000
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class LocalTask:
    """A task read from a file: the harness's settings, and the items of each split."""

    name: str
    settings: dict[str, Any]
    items: Mapping[str, list[dict[str, Any]]]
    files: tuple[Path, ...]  # all that it was read from


def builtin_names() -> list[str]:
    """Names that `builtin:NAME` accepts."""
    return sorted(file.stem for file in _BUILTIN_FOLDER.glob("*.yaml"))


def is_local(name: str) -> bool:
    """Whether a name of the config stands for files: `builtin`, `builtin:NAME`, or a path."""
    return name.partition(":")[0] == BUILTIN or "/" in name or name.endswith(_SUFFIXES) or Path(name).is_dir()


def task_files(name: str) -> list[Path]:
    """The task files that a local name stands for. Raises ConfigError where there are none."""
    if name == BUILTIN:
        return [_BUILTIN_FOLDER / f"{one}.yaml" for one in builtin_names()]
    if name.startswith(f"{BUILTIN}:"):
        wanted, known = name.partition(":")[2], builtin_names()
        if wanted not in known:
            near = difflib.get_close_matches(wanted, known, n=1)
            raise ConfigError(
                f"the task {name}", expected=f"{BUILTIN}:NAME with one of {', '.join(known)}", got="no such task",
                hint=f"did you mean {BUILTIN}:{near[0]}?" if near else f"{BUILTIN} alone stands for all of them",
            )  # fmt: skip
        return [_BUILTIN_FOLDER / f"{wanted}.yaml"]
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"the task {name}", expected="a YAML file, or a folder of them", got="no such file or folder")
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    tasks = [file for file in files if not file.name.startswith("_")]  # the harness's mark of what others include
    if not tasks:
        raise ConfigError(f"the task {name}", expected="YAML files of tasks in this folder", got="none")
    return tasks


def local_files(names: Sequence[str]) -> dict[str, Path]:
    """All files of the local tasks among `names`, by task and place beside its YAML. Raises as `read_task` does."""
    found: dict[str, Path] = {}
    for path in (path for name in names if is_local(name) for path in task_files(name)):
        task = read_task(path)
        found |= {f"{task.name}: {file.relative_to(path.parent)}": file for file in task.files}
    return found


def read_task(file: Path) -> LocalTask:
    """Read one task file and its items.

    Raises ConfigError for what is no task, or more than data, and DataError for items that cannot be read.
    """
    tree, files = _read_settings(file, ())
    settings = _checked(file, tree)
    items: dict[str, list[dict[str, Any]]] = {}
    for split, names in _data_files(file, settings).items():
        paths = [_inside(file.parent, name, file) for name in names]
        items[split] = [item for path in paths for item in _read_items(path, settings.dataset_path)]
        files += paths
    for key in ("test_split", "validation_split", "training_split", "fewshot_split"):
        wanted = getattr(settings, key)
        if wanted is not None and wanted not in items:
            raise ConfigError(f"{file}: {key}", expected=f"one of {', '.join(items)}", got=wanted)
    return LocalTask(settings.task, settings.for_harness(), items, tuple(dict.fromkeys(files)))


def _read_settings(file: Path, outer: Sequence[Path]) -> tuple[dict[str, Any], list[Path]]:
    if file in outer:
        raise ConfigError(f"{file}: include", expected="files that do not include each other", got=str(file))
    tree = parse_yaml(read_text(file, ConfigError), str(file))
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} is no task", expected="a mapping with the key task", got=type(tree).__name__)
    included = tree.get("include") or []
    merged: dict[str, Any] = {}
    files = [file]
    for name in included if isinstance(included, list) else [included]:
        settings, more = _read_settings(_inside(file.parent, name, file), (*outer, file))
        merged |= settings
        files += more
    return {**merged, **tree}, files


def _checked(file: Path, settings: Mapping[str, Any]) -> TaskSettings:
    """The settings of a task. Raises ConfigError with everything that is wrong."""
    try:
        return TaskSettings.model_validate(settings)
    except ValidationError as error:
        problems = "".join(f"\n  - {line}" for line in explain_errors(error, TaskSettings))
        raise ConfigError(
            f"{file} cannot be used as a task:{problems}",
            hint="a task file is data: what names code, or data on the hub, is left out",
        ) from error


def _data_files(file: Path, settings: TaskSettings) -> dict[str, list[str]]:
    """Names of the data files of each split."""
    named = settings.dataset_kwargs.data_files or f"{file.stem}{_READERS[settings.dataset_path][0]}"
    if not isinstance(named, dict):
        named = {str(settings.test_split or settings.validation_split): named}
    return {split: [names] if isinstance(names, str) else names for split, names in named.items()}


def _inside(folder: Path, name: Any, file: Path) -> Path:
    """A file in the task's folder. Raises ConfigError for any other place, also by way of a link."""
    try:
        path = safe_join(folder, str(name))
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{file} names a file outside its folder", got=repr(name))
    except KdscaleError as error:
        hint = "put the file beside the task"
        raise ConfigError(f"{file} names a file outside its folder", got=repr(name), hint=hint) from error
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL
        raise ConfigError(f"{file} names a file that cannot be read", got=repr(name)) from error
    return path


def _read_items(path: Path, source: str) -> list[dict[str, Any]]:
    """All items of a data file, each with every key that any of them has."""
    items = list(_READERS[source][1](path, read_text(path, DataError, _MOST_BYTES)))
    if not 0 < len(items) <= _MOST_ITEMS:
        raise DataError(f"{path}", expected=f"1 to {_MOST_ITEMS:,} items", got=f"{len(items):,}")
    keys = dict.fromkeys(key for item in items for key in item)
    return [{key: item.get(key) for key in keys} for item in items]


def _json_items(path: Path, text: str) -> Iterator[dict[str, Any]]:
    if path.suffix == ".json":
        values = list(enumerate(parse_json(text, str(path), DataError, expect=list), start=1))
        what = "item"
    else:
        lines = enumerate(text.split("\n"), start=1)
        values = [(n, parse_json(line, f"{path} line {n}", DataError)) for n, line in lines if line.strip()]
        what = "line"
    for number, value in values:
        if not isinstance(value, dict):
            raise DataError(
                f"{path} {what} {number}", expected="an object with the item's fields", got=f"{value!r:.80}"
            )
        yield value


def _csv_items(path: Path, text: str) -> Iterator[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise DataError(
                    f"{path} line {rows.line_num}",
                    expected=f"{len(rows.fieldnames or [])} columns",
                    got="another number",
                )
            yield dict(row)
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num} is not valid CSV", got=str(error)) from error


# dataset_path: (the suffix of the file beside the task, how it is read)
_READERS = {"json": (".jsonl", _json_items), "csv": (".csv", _csv_items)}
