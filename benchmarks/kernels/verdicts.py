"""The project's targets, judged by the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rows import ERROR_COLUMNS, Row

CPU, REFERENCE, HALF = (2048, 576, 49152, 64), (16384, 4096, 128256, 64), (8192, 4096, 128256, 64)
STUDENT, BOTH, TOPK = "linear_sparse_kl", "teacher_and_student", "linear_topk_lse"


@dataclass(frozen=True)
class Verdict:
    """One target, and what the table says of it."""

    target: str
    limit: str
    measured: str
    met: bool | None  # None: not measured


@dataclass(frozen=True)
class _Table:
    """The measured rows of one shape that hold a comparison's numbers: with gradients where the op has any."""

    rows: Sequence[Row]
    shape: tuple[int, int, int, int]

    def best(self, column: str, op: str, contestant: str, mode: str | None = None) -> float | None:
        """The smallest value over the contestant's modes (or of one mode)."""
        return min(self._values(column, op, contestant, mode).values(), default=None)

    def best_mode(self, column: str, op: str, contestant: str) -> str:
        """Whose value that is; empty where nothing was measured."""
        values = self._values(column, op, contestant, None)
        return min(values, key=values.__getitem__, default="")

    def _values(self, column: str, op: str, contestant: str, mode: str | None) -> dict[str, float]:
        """By mode."""
        direction = "forward" if op == TOPK else "forward+backward"
        return {
            row.mode: float(value)
            for row in self.rows
            if row.shape[:4] == self.shape
            and (row.op, row.contestant, row.direction) == (op, contestant, direction)
            and (mode is None or row.mode == mode)
            and (value := getattr(row, column)) != ""
        }


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The targets for the shapes that this table holds; a target whose rows are missing is "not measured"."""
    on_gpu = any(row.threads == "" for row in rows)
    shapes = {row.shape[:4] for row in rows}
    judged = []
    if not on_gpu and CPU in shapes:
        judged += _cpu(_Table(rows, CPU))
    if on_gpu and REFERENCE in shapes:
        judged += _gpu(_Table(rows, REFERENCE))
    if on_gpu and HALF in shapes:
        table = _Table(rows, HALF)
        liger = table.best("ratio_to_ours", BOTH, "Liger fused linear JSD")
        judged.append(_judge("time, N=8192: Liger fused linear JSD / teacher and student", liger, 3.5, at_least=True))
    own = [row for row in rows if (row.op, row.contestant, row.mode) == (STUDENT, "kdscale", "auto")]
    errors = [float(v) for row in own for column in ERROR_COLUMNS[2:] if (v := getattr(row, column)) != ""]
    return [*judged, _judge("gradient error, matched regimes, worst shape", max(errors, default=None), 5e-3)]


_CPU_TIMES = {
    "time": "ratio_to_ours",
    "processor time": "cpu_ratio_to_ours",
    "the calling thread's processor time": "caller_ratio_to_ours",
}


def _cpu(table: _Table) -> Iterator[Verdict]:
    peak = _quotient(
        table.best("peak_bytes", STUDENT, "kdscale", "auto"), table.best("peak_bytes", STUDENT, "eager torch")
    )
    yield _judge("peak memory: linear_sparse_kl (auto) / eager torch", peak, 1 / 8)
    for name, op, contestant in (
        ("linear_sparse_kl (auto) / eager torch", STUDENT, "eager torch"),
        ("teacher and student (auto) / Liger's best chunked setting", BOTH, "Liger chunked loss"),
        ("linear_sparse_kl (auto) / Liger's best, less the teacher's product", STUDENT, "Liger chunked loss"),
    ):
        for what, column in _CPU_TIMES.items():
            yield _judge(f"{what}: {name}", _quotient(1.0, table.best(column, op, contestant)), 1.0)


def _gpu(table: _Table) -> Iterator[Verdict]:
    for name, op in (("linear_sparse_kl / three bare products", STUDENT), ("linear_topk_lse / one bare product", TOPK)):
        ours = table.best("ratio_to_ours", op, "kdscale")
        mode = table.best_mode("ratio_to_ours", op, "kdscale")
        target = f"time: {name} ({mode})" if mode else f"time: {name}"
        yield _judge(target, _quotient(ours, table.best("ratio_to_ours", op, "bare products")), 1.1)
    in_place = table.best("seconds_median", "sparse_kl", "kdscale", "in place")
    yield _judge("sparse_kl in place", _quotient(in_place, 1e-3), 3.3, " ms")
    for mode, limit in (("vocabulary slices", 0.45), ("row chunks", 1.2)):
        peak = _quotient(table.best("peak_bytes", STUDENT, "kdscale", mode), 1e9)
        yield _judge(f"peak memory, {mode}", peak, limit, " GB")


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _judge(name: str, got: float | None, limit: float, unit: str = "", at_least: bool = False) -> Verdict:
    bound = f"{'≥' if at_least else '≤'} {limit:.3g}{unit}"
    if got is None:
        return Verdict(name, bound, "not measured", None)
    return Verdict(name, bound, f"{got:.3g}{unit}", got >= limit if at_least else got <= limit)
