"""Counts, sizes and times as people write them in a config: `4B`, `8GiB`, `12ms`, `50%`."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

_COUNT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKmMbBtT]?)\s*$")


_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(value: Any) -> Any:
    """`4B` → 4_000_000_000, `250k` → 250_000; integers pass, the rest is left to pydantic to refuse."""
    if isinstance(value, str) and (match := _COUNT.match(value)):
        exact = float(match[1]) * _SCALE[match[2].lower()]
        if exact == int(exact):
            return int(exact)
    return value


Unit = Literal["count", "bytes", "milliseconds"]


# The fields that name a budget, and what each is counted in; at most one is given.
TARGETS: dict[str, Unit] = {
    "target_params": "count",
    "target_bytes": "bytes",
    "target_kv_bytes": "bytes",
    "target_decode": "milliseconds",
    "target_prefill": "milliseconds",
}


_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*$")


_TIME = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*$")


_EXAMPLES = {
    "count": "a count such as 4B or 135M",
    "bytes": "a size such as 8GiB or 32KiB",
    "milliseconds": "a time such as 12ms",
}


def parse_target(text: str, unit: Unit = "count") -> tuple[Literal["absolute", "fraction"], float]:
    """`4B` → ("absolute", 4e9); `8GiB` → ("absolute", 2**33); `12ms` → ("absolute", 12.0); `50%` → ("fraction", 0.5).

    Raises ValueError.
    """
    if text.strip().endswith("%"):
        try:
            share = float(text.strip()[:-1]) / 100
        except ValueError:
            share = -1.0
        if 0 < share < 1:
            return "fraction", share
    elif unit == "count":
        if isinstance(count := parse_count(text), int) and count > 0:
            return "absolute", float(count)
    elif unit == "bytes":
        match = _BYTES.match(text)
        if match and (size := float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")):
            return "absolute", size
    elif (match := _TIME.match(text)) and (time := float(match[1]) * {"ms": 1.0, "s": 1000.0}[match[2]]) > 0:
        return "absolute", time
    raise ValueError(f"expected {_EXAMPLES[unit]}, or a share such as 50%, got {text!r}")


def significant(value: float) -> str:
    """Three figures: 23.9, 1,234, 0.0123."""
    return f"{value:,.{_decimals(value)}f}"


def count(value: float) -> str:
    """`134.5 M`, `8.03 B`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:  # what would be written as 1000 of the smaller unit
            return f"{_short(value / limit)} {unit}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in decimal units: `269 MB`, `23.0 kB`."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * limit:  # what would be written as 1000 of the smaller unit
            return f"{_short(value / limit)} {unit}"
    return f"{value:,.0f} B"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def _decimals(value: float) -> int:
    if not value or abs(value) >= 100:
        return 0
    return max(0, 2 - math.floor(math.log10(abs(value))))


def compact(value: float) -> str:
    """For the ticks of an axis: `250k`, `1.5M`, `94M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"
