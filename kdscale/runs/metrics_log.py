"""Training curves: one JSON object a line, and the same figures for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends rows to `metrics.jsonl`; a resumed run first cuts what a killed one wrote past its last checkpoint."""

    def __init__(self, path: Path, resume_step: int = 0, tensorboard_dir: Path | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        tmp = path.with_name(path.name + ".tmp")
        tmp.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        tmp.replace(path)
        self._stream = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard_dir is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(tensorboard_dir), purge_step=resume_step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row of JSON values: `kind` is "train" or "validation"; numbers also go to TensorBoard as kind/name."""
        self._stream.write(_line({"kind": kind, "step": step, **values}))
        self._stream.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
