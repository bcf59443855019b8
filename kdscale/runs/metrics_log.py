"""Training curves: one JSON object a line, and the same figures for TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kdscale.errors import FileError
from kdscale.files import atomic_path, is_plain_or_absent, open_plain, parse_json, read_bytes, set_aside

_NO_FIGURES = {"kind": str, "documents": str, "micro_batches": list}  # the columns that are no figures
_LARGEST, _LARGEST_FIGURE = 4 << 30, 1e300
_SYNC_SECONDS = 5.0  # the most that a power cut takes from a log whose writer does not call `sync` itself


class MetricsLog:
    """Appends rows to `metrics.jsonl`; a resumed run first cuts what a killed one wrote past its last checkpoint.

    Lines that cannot be read are kept where they are, and reported through `say`.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int = 0,
        tensorboard_dir: Path | None = None,
        say: Callable[[str], None] = lambda message: None,
    ):
        if not is_plain_or_absent(path):
            set_aside(path, say)
        # before the first checkpoint nothing is gone on with, not even the validation of step 0
        first = resume_step + 1 if resume_step else 0
        kept = []
        for number, line, row in _lines(path):
            if row is None:
                say(f"{path}: line {number} is damaged; it is kept, and left out of every plot")
            if row is None or row["step"] < first:
                kept.append(line)
        with atomic_path(path) as tmp:
            tmp.write_bytes(b"".join(line + b"\n" for line in kept))
        self._stream = path.open("ab")
        self._synced = time.monotonic()
        self._board: Any = None
        if tensorboard_dir is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(tensorboard_dir), purge_step=first)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row of JSON values: `kind` is "train" or "validation"; numbers also go to TensorBoard as kind/name."""
        self._stream.write(json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n")
        self._stream.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Make the rows so far survive a power cut; called before a checkpoint, which a resume cuts the log to."""
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Flush everything to the disk and let go of the files."""
        self.sync()
        self._stream.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; lines that are damaged, or that a kill cut short, are left out."""
    return (row for _, _, row in _lines(path) if row is not None)


def last_metrics(path: Path, size: int = 1 << 18) -> list[dict[str, Any]]:
    """The rows in the last `size` bytes of a metrics file, for those who look at it every second."""
    try:
        with open_plain(path) as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - size))
            lines = stream.read(size).split(b"\n")
    except OSError:  # not there yet, or put in another's place just now
        return []
    return [row for line in (lines if end <= size else lines[1:]) if line and (row := parse_row(line)) is not None]


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Each line with its number from 1 and its row, None for one that is damaged; without a last line cut by a kill."""
    if not path.is_file():
        return
    *lines, last = read_bytes(path, limit=_LARGEST).split(b"\n")
    for number, line in enumerate(lines, 1):
        yield number, line, parse_row(line)
    if last and (row := parse_row(last)) is not None:  # whole but for its newline
        yield len(lines) + 1, last, row


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line: `kind`, `step` and figures; None for anything else."""
    try:
        row = parse_json(line.decode("utf-8"), "row", expect=dict)
    except (FileError, UnicodeDecodeError):
        return None
    sound = "kind" in row and type(row.get("step")) is int and row["step"] >= 0
    for name, value in row.items():
        sound = sound and (isinstance(value, _NO_FIGURES[name]) if name in _NO_FIGURES else is_figure(value))
    return row if sound else None


def is_figure(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and -_LARGEST_FIGURE < value < _LARGEST_FIGURE  # neither for NaN
