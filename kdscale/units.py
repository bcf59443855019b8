"""Counts, sizes and times: read from a config (`4B`, `8GiB`, `12ms`, `50%`) and written for people."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

Unit = Literal["count", "bytes", "milliseconds"]

# The config fields that give a budget, and what each is counted in; at most one of them is set.
BUDGET_FIELDS: dict[str, Unit] = {
    "target_params": "count",
    "target_bytes": "bytes",
    "target_kv_bytes": "bytes",
    "target_decode": "milliseconds",
    "target_prefill": "milliseconds",
}

_COUNT = re.compile(r"^\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kKmMbBtT]?)\s*$")
_BYTES = re.compile(r"^\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kKMGT]?)(i?)B?\s*$")
_TIME = re.compile(r"^\s*(\d{1,20}(?:\.\d{1,20})?)\s*(ms|s)\s*$")
_COUNT_SCALES = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}  # largest first
_BYTE_SCALES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
_EXAMPLES = {
    "count": "a count such as 4B or 135M",
    "bytes": "a size such as 8GiB or 32KiB",
    "milliseconds": "a time such as 12ms",
}


def parse_count(value: Any) -> Any:
    """`4B` → 4_000_000_000, `250k` → 250_000. Anything else is returned as it is, for pydantic to accept or refuse."""
    if isinstance(value, str) and (match := _COUNT.match(value)):
        scale = {key.lower(): scale for key, scale in _COUNT_SCALES.items()}.get(match[2].lower(), 1.0)
        count = float(match[1]) * scale
        if count == int(count):
            return int(count)
    return value


def parse_budget(text: str, unit: Unit = "count") -> tuple[Literal["absolute", "fraction"], float]:
    """`4B` → ("absolute", 4e9); `8GiB` → ("absolute", 2**33); `12ms` → ("absolute", 12.0); `50%` → ("fraction", 0.5).

    Raises ValueError for anything else, with an example of what the unit expects.
    """
    if text.strip().endswith("%"):
        try:
            fraction = float(text.strip()[:-1]) / 100
        except ValueError:
            fraction = -1.0
        if 0 < fraction < 1:
            return "fraction", fraction
    elif unit == "count":
        if isinstance(count := parse_count(text), int) and count > 0:
            return "absolute", float(count)
    elif unit == "bytes":
        match = _BYTES.match(text)
        if match and (size := float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")):
            return "absolute", size
    elif (match := _TIME.match(text)) and (time := float(match[1]) * {"ms": 1.0, "s": 1000.0}[match[2]]) > 0:
        return "absolute", time
    raise ValueError(f"expected {_EXAMPLES[unit]}, or a share such as 50%")


def format_number(value: float) -> str:
    """An int in full, a float to three significant figures: `1,234,567`, `23.9`, `0.0123`."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals(value)}f}"


def format_count(value: float, digits: int = 3) -> str:
    """`8.03 B`, `135 M`; `134.5 M` with four digits."""
    return _scaled(value, _COUNT_SCALES, digits) or f"{value:,.0f}"


def format_size(value: float) -> str:
    """Bytes in decimal units: `269 MB`, `23.0 kB`."""
    return _scaled(value, _BYTE_SCALES, 3) or f"{value:,.0f} B"


def format_duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_rate(rate: float, unit: str) -> str:
    """`1,234 tok/s`, `3.2 layer/s`, `1.23 MB/s`; below one a second the time that one takes: `4.2 s a round`."""
    if unit == "B":
        return f"{format_size(rate)}/s"
    if rate < 1:
        return f"{format_duration(1 / rate)} a {unit}"
    return f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s"


def compact_count(value: float, digits: int = 3) -> str:
    """For ticks and narrow columns: `2.05B`, `1.5M`, `250k`."""
    return _compact(value, _COUNT_SCALES, digits) or f"{value:.{digits}g}"


def compact_size(value: float) -> str:
    """Bytes for narrow columns: `2.05GB`, `46.1kB`."""
    return _compact(value, _BYTE_SCALES, 3) or f"{value:.0f}B"


def compact_duration(seconds: float) -> str:
    """In the largest unit of which there are two: `12 d`, `47 h`, `30 min`, `50 s`."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def decimals(value: float, digits: int = 3) -> int:
    """How many decimals show `digits` significant figures of `value`."""
    if not value or abs(value) >= 10 ** (digits - 1):
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def _scaled(value: float, scales: dict[str, float], digits: int) -> str | None:
    """`value` in the largest unit that leaves at least 1 of it, or None below the smallest unit."""
    for unit, scale in scales.items():
        if value >= _rounds_up_to(scale, digits):
            number = value / scale
            places = next(
                places for places in range(digits) if number >= _rounds_up_to(10 ** (digits - 1 - places), digits)
            )
            return f"{number:.{places}f} {unit}"
    return None


def _compact(value: float, scales: dict[str, float], digits: int) -> str | None:
    for unit, scale in scales.items():
        if abs(value) >= _rounds_up_to(scale, digits):
            return f"{max(abs(value) / scale, 1.0) * math.copysign(1, value):.{digits}g}{unit}"
    return None


def _rounds_up_to(limit: float, digits: int) -> float:
    """The smallest value that is written as `limit`: 999.5 k is 1.00 M with three digits."""
    return limit * (1 - 0.5 * 10.0**-digits)
