"""The rows of a table: what each column holds, and how a CSV is written."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from inputs import REGIMES
from measure import Seconds

from kdscale import files

ERROR_COLUMNS = [f"error_{what}_{regime}" for regime in REGIMES for what in ("dX", "dW")]


@dataclass
class Row:
    """One contestant, shape and direction. Empty cells were not measured; status and reason say why."""

    op: str
    contestant: str
    mode: str
    loss: str
    direction: str
    status: str  # ok | cannot run here | failed
    reason: str
    N: int
    H: int
    V: int
    K: int
    dtype: str
    rounds: int = 0
    seconds_median: float | str = ""
    seconds_p20: float | str = ""
    seconds_p80: float | str = ""
    ratio_to_ours: float | str = ""  # median over rounds of its time / that of kdscale (auto) in the same round
    ratio_p20: float | str = ""
    ratio_p80: float | str = ""
    cpu_seconds_median: float | str = ""  # CPU only: processor time of all threads, and its ratio to ours
    cpu_ratio_to_ours: float | str = ""
    caller_ratio_to_ours: float | str = ""  # CPU only: likewise of the calling thread's processor time
    peak_bytes: int | str = ""  # beyond inputs and gradients handed back
    error_dX_random: float | str = ""  # relative to fp64; for op sparse_kl that of the logits' gradient
    error_dW_random: float | str = ""
    error_dX_noise_03: float | str = ""
    error_dW_noise_03: float | str = ""
    error_dX_noise_005: float | str = ""
    error_dW_noise_005: float | str = ""
    device: str = ""
    threads: int | str = ""
    torch: str = ""
    triton: str = ""
    peer: str = ""  # the contestant's package and version
    date: str = ""

    @property
    def shape(self) -> tuple[int, int, int, int, str]:
        """N, H, V, K and dtype."""
        return self.N, self.H, self.V, self.K, self.dtype

    @property
    def label(self) -> str:
        """The contestant and its mode, for people."""
        return f"{self.contestant}, {self.mode}" if self.mode else self.contestant


COLUMNS = [field.name for field in fields(Row)]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, p20, p80), to four digits."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return tuple(float(f"{v:.4g}") for v in (statistics.median(values), low, high))  # type: ignore[return-value]


def add_times(row: Row, seconds: Sequence[Seconds], kdscale: Sequence[Seconds] | None, on_cpu: bool) -> None:
    """Fill in the times of each round; `kdscale` are those of its own contestant (auto) in the same rounds."""
    row.rounds = len(seconds)
    row.seconds_median, row.seconds_p20, row.seconds_p80 = quantiles([s.wall for s in seconds])
    pairs = list(zip(seconds, kdscale or [], strict=False))
    if pairs:
        row.ratio_to_ours, row.ratio_p20, row.ratio_p80 = quantiles([own.wall / base.wall for own, base in pairs])
    if on_cpu:
        row.cpu_seconds_median = quantiles([s.cpu for s in seconds])[0]
        if pairs:
            row.cpu_ratio_to_ours = quantiles([own.cpu / base.cpu for own, base in pairs])[0]
            row.caller_ratio_to_ours = quantiles([own.caller / base.caller for own, base in pairs])[0]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows of a table, with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    files.write_text(path, stream.getvalue())
