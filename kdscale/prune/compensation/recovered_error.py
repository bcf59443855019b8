"""How much of a projection's output a cut loses, and how much compensation wins back: what the pruning report shows.

Measured on a sample of the tokens the repair pass runs on, with the weights themselves, so that it holds for whatever
method made them: error = ‖x_K W'ᵀ − x Wᵀ‖ / ‖x Wᵀ‖ (Frobenius norms over tokens and kept outputs), with W' first the
sliced and then the compensated weight. In memory a layer: 512 rows of each projection's input.

N sampled tokens · D outputs · U inputs · K kept inputs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdscale.files import read_own_json, write_json

_ROWS = 512


class RecoveredErrors:
    """The errors of every compensated projection, written to `path` after each; begins with what is there already.

    The file: {"version": 1, "layers": [{"layer": the teacher's, "role": "down" or "o", "before", "after": relative
    errors, "kept", "of": inputs}]}, by layer and role. Experts of a mixture are one row per layer, with "experts", how
    many, and "short_of_tokens", how many of them had fewer tokens than kept inputs.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._rows: dict[tuple[int, str], dict[str, object]] = {}
        known = read_own_json(path, _are_errors) if path is not None else None
        if known is not None:
            self._rows = {(row["layer"], row["role"]): row for row in known["layers"]}

    @property
    def rows(self) -> list[dict[str, object]]:
        """All rows, by layer and role."""
        return [self._rows[key] for key in sorted(self._rows)]

    def keep_layers(self, layers: list[int]) -> None:
        """Forget layers that this plan does not have: what another plan's pass left."""
        self._rows = {key: row for key, row in self._rows.items() if key[0] in layers}
        self._write()

    def add(
        self, layer: int, role: str, sample: InputSample, weight_DU: Tensor, kept: Tensor, solved_DK: Tensor
    ) -> None:
        """Record one projection: the teacher's weight, the inputs that stay, and the weight that the student got."""
        x_NU = sample.rows_NU().to(weight_DU.device)
        weight_DU = weight_DU.float()
        output_ND = x_NU @ weight_DU.T
        norm = output_ND.norm().clamp_min(torch.finfo(torch.float32).tiny)
        x_NK = x_NU[:, kept]
        before = float((x_NK @ weight_DU[:, kept].T - output_ND).norm() / norm)
        after = float((x_NK @ solved_DK.to(x_NK).T - output_ND).norm() / norm)
        self.record(layer, role, {"before": before, "after": after, "kept": len(kept), "of": weight_DU.shape[1]})

    def record(self, layer: int, role: str, figures: dict[str, object]) -> None:
        """Record figures that were measured elsewhere."""
        self._rows[layer, role] = {"layer": layer, "role": role, **figures}
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, {"version": 1, "layers": self.rows})


def _are_errors(value: Any) -> bool:
    """Whether a JSON value is what `RecoveredErrors` writes."""
    rows = value.get("layers") if isinstance(value, dict) else None
    return isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("layer"), int) and isinstance(row.get("role"), str) for row in rows
    )


class InputSample:
    """Up to 512 rows of what one projection reads, spread evenly over `batches` batches."""

    def __init__(self, batches: int):
        self._rows_per_batch = max(1, -(-_ROWS // max(batches, 1)))
        self._taken: list[Tensor] = []
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Take some rows of one batch, `x`: [..., U]."""
        x_NU = x.flatten(0, -2)
        rows = min(self._rows_per_batch, _ROWS - self._count, len(x_NU))
        if rows > 0:
            self._taken.append(x_NU[:: max(1, len(x_NU) // rows)][:rows].float())
            self._count += rows

    def rows_NU(self) -> Tensor:  # noqa: N802
        """The rows taken so far, [N, U] in fp32."""
        return torch.cat(self._taken)
