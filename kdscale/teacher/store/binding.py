"""What a store is bound to: the teacher, its tokenizer, the tokenised text, and how sequences are packed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdscale.config.load import config_differences
from kdscale.errors import ConfigError
from kdscale.files import sha256_file
from kdscale.runs.digests import digest_file, digest_tree
from kdscale.runs.folder import WEIGHTS
from kdscale.teacher.store.format import StoreHeader

_NAMES = {
    "made_from.teacher": "the teacher's weights",
    "made_from.tokenizer": "the tokenizer",
    "made_from.tokens": "the tokenised text",
    "made_from.student": "the pruned student that chose the positions",
}


def made_from(teacher_dir: Path, data_dir: Path, student_dir: Path | None) -> dict[str, str | dict[str, str]]:
    """Digests of everything that stored targets depend on; `student_dir`: of the student that chooses positions."""
    student: dict[str, str | dict[str, str]] = {}
    if student_dir is not None:
        student = {"student": dict(digest_tree(student_dir, WEIGHTS))}
    return {**_of_teacher(teacher_dir), "tokens": sha256_file(data_dir / "manifest.json"), **student}


def _of_teacher(folder: Path) -> dict[str, str | dict[str, str]]:
    return {"teacher": dict(digest_tree(folder, WEIGHTS)), "tokenizer": digest_file(folder / "tokenizer.json")}


def check_same(folder: Path, stored: StoreHeader, wanted: StoreHeader) -> None:
    """Raises ConfigError, naming both values of all that differ, unless `folder` holds what is wanted, or more of it.

    The number of shards' sequences is the store's own, and so is the dtype in which its teacher ran.
    """
    free = {"shard_sequences", "dtype", "train"}
    old, new = (header.model_dump(mode="json", exclude=free) for header in (stored, wanted))
    lines = [_in_words(difference.field, difference.old, difference.new) for difference in config_differences(old, new)]
    if wanted.train > stored.train:
        lines.append(f"training sequences: {stored.train:,} are covered, {wanted.train:,} are wanted")
    if lines:
        listed = "\n".join(f"  - {line}" for line in lines)
        raise ConfigError(
            f"{folder} is a store of other targets:\n{listed}",
            hint="use the settings and files that it was written with, or another targets.path",
        )


def check_teacher(folder: Path, stored: StoreHeader, teacher_dir: Path) -> None:
    """Raises ConfigError, naming both digests, when the store was made by another teacher or tokenizer."""
    now = _of_teacher(teacher_dir)
    lines = [
        _in_words(difference.field, difference.old, difference.new)
        for difference in config_differences({key: stored.made_from.get(key) for key in now}, now, "made_from")
    ]
    if lines:
        listed = "\n".join(f"  - {line}" for line in lines)
        raise ConfigError(f"{folder} was made by another teacher than {teacher_dir}:\n{listed}")


def _in_words(field: str, old: Any, new: Any) -> str:
    name = next(
        (words + field.removeprefix(start) for start, words in _NAMES.items() if field.startswith(start)), field
    )
    old, new = (str(value)[:12] if field.startswith("made_from") else value for value in (old, new))
    return f"{name}: the store has {old}, this run {new}"
