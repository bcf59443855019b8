"""SHA256SUMS: the hash of every file of a package, in the format of `sha256sum`, which verifies it too."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kdscale.errors import FileError
from kdscale.files import read_text, safe_join, sha256_file, write_text

SUMS = "SHA256SUMS"
_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED = re.compile(r"\\(.)")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of all files in `folder` and below, sorted by name. Raises FileError for a name not in UTF-8."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = []
    for name in names:
        if any("\ud800" <= character <= "\udfff" for character in name):  # as Python reads what is not UTF-8
            raise FileError(
                f"{folder / name}", expected="a name in UTF-8", hint="rename the file in the student's folder"
            )
        escaped = "".join(_ESCAPES.get(character, character) for character in name)
        mark = "\\" if escaped != name else ""  # as sha256sum marks a name that it had to escape
        lines.append(f"{mark}{sha256_file(folder / name)}  {escaped}\n")
    write_text(folder / SUMS, "".join(lines))


def verified_files(folder: Path) -> list[str]:
    """The files that SHA256SUMS names, verified, by their names. Raises FileError that lists all that do not match.

    A name that leads out of the folder, and a link, does not match: what it leads to would be published.
    """
    problems, names = [], []
    for line in read_text(folder / SUMS).split("\n")[:-1]:  # names may hold other ends of lines
        match = _LINE.fullmatch(line)
        if match is None:
            raise FileError(f"{folder / SUMS}", expected="lines as sha256sum writes them", got=repr(line[:100]))
        escaped, digest, name = match.groups()
        if escaped:
            name = _ESCAPED.sub(lambda found: {"n": "\n", "r": "\r"}.get(found[1], found[1]), name)
        path = safe_join(folder, name)
        if not path.is_file() or _has_link(folder, path):
            problems.append(f"{name} is " + ("a link" if os.path.lexists(path) else "missing"))
        elif sha256_file(path) != digest:
            problems.append(f"{name} was changed")
        names.append(name)
    if problems or not names:
        more = ["…"] if len(problems) > 8 else []
        raise FileError(
            f"{folder} is not as it was packaged", expected=f"the files of {SUMS}",
            got="; ".join([*problems[:8], *more]) or "no files", hint="make the package again: kdscale package RUN",
        )  # fmt: skip
    return names


def _has_link(folder: Path, path: Path) -> bool:
    return any(item.is_symlink() for item in (path, *path.parents) if item.is_relative_to(folder) and item != folder)
