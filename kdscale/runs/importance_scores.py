"""The importance scores on disk: arrays in scores.safetensors; units, sizes and a summary in scores.json. No torch.

L layers
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdscale.config import criteria
from kdscale.errors import CheckpointError
from kdscale.files import atomic_path, read_json, write_json

SCORES_FILE, SUMMARY_FILE = "scores.safetensors", "scores.json"
NOTICES_FILE = "notices.json"  # sentences on the calibration text; absent where there are none
# Among the scores, of the hidden axis, [D, D] each: the rotation of hidden.pca (prune/rotation.py); of hidden.refit the
# directions of the stream, in rows, and the second moments of what enters the final norm (prune/stream_cut.py).
ROTATION = "hidden.rotation"
DIRECTIONS, FINAL_COVARIANCE = "hidden.directions", "hidden.final_covariance"


class ImportanceScores(dict[str, NDArray[np.float32]]):
    """Score arrays by name (`axis.method`), each with its unit: scores read from a file keep the units in the file."""

    def __init__(self, arrays: Mapping[str, Any], units: Mapping[str, str] | None = None):
        """`units`: by name; by default the ones in the table of criteria, for scores that were just measured."""
        super().__init__(arrays)
        table = {name: row.unit for row in criteria.CRITERIA for name in row.names}
        self.units = {name: table[name] for name in sorted(arrays) if name in table} if units is None else dict(units)

    def energy(self, name: str) -> NDArray[np.float64]:
        """The scores as energies, which add up: norms are squared. Raises KeyError for a name without a unit."""
        values = np.asarray(self[name], dtype=np.float64)
        return values**2 if self.units[name] == "norm" else values


def write_scores(out_dir: Path, scores: ImportanceScores, summary: Mapping[str, Any]) -> None:
    """Write both files, each whole or not at all; the summary last, so that its presence says the scores are there."""
    from safetensors.numpy import save_file

    with atomic_path(out_dir / SCORES_FILE) as tmp:
        save_file({name: np.ascontiguousarray(scores[name]) for name in sorted(scores)}, tmp)
    arrays = {name: list(values.shape) for name, values in sorted(scores.items())}
    per_layer = {name: values for name, values in sorted(scores.items()) if not name.startswith("hidden")}
    rows = [
        {"layer": layer, **{name: _row(values[layer]) for name, values in per_layer.items()}}
        for layer in range(max(map(len, per_layer.values()), default=0))
    ]
    write_json(
        out_dir / SUMMARY_FILE,
        {"version": 1, **summary, "arrays": arrays, "units": scores.units, "layers": rows},
    )


def load_scores(folder: Path) -> ImportanceScores:
    """The scores that `write_scores` left in `folder`.

    Raises CheckpointError when they are missing, damaged or without units.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / SCORES_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", expected="importance scores", hint="run kdscale importance first")
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged", got=str(error), hint="run kdscale importance again") from error
    units = read_json(folder / SUMMARY_FILE, CheckpointError, expect=dict).get("units")
    if not isinstance(units, dict) or any(unit not in ("energy", "norm") for unit in units.values()):
        hint = f"delete {folder} and run kdscale importance again"
        raise CheckpointError(f"{folder / SUMMARY_FILE} has no units", expected="a unit for each score", hint=hint)
    return ImportanceScores(arrays, units)


def _row(values: NDArray[np.float32]) -> dict[str, float] | float:
    """What a person wants to see of one layer: how much there is and how unevenly it is spread."""
    if values.ndim == 0:
        return float(values)
    ordered = np.sort(values.astype(np.float64), axis=None)[::-1]
    total = float(ordered.sum())
    half = float(ordered[: (len(ordered) + 1) // 2].sum()) / total if total > 0 else 0.0
    return {
        "sum": total,
        "mean": total / len(ordered),
        "max": float(ordered[0]),
        "min": float(ordered[-1]),
        "share_of_top_half": half,
    }
