"""Counts, sizes and times as people write them in a config: `4B`, `8GiB`, `12ms`, `50%`."""

from __future__ import annotations

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
