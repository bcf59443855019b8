"""The table of benchmarks/faults/faults.py: per fault and condition, how often, how soon noticed, what was lost."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The records of an output file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(path: Path) -> int:
    """Print the table; returns 1 when a fault cost more than its limit or a student differs."""
    rows = read(path)
    runs = [row for row in rows if row.get("kind") == "run"]
    injections = [row for row in rows if row.get("kind") != "run"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in injections:
        groups[row["fault"], row["condition"]].append(row)
    print(
        "| fault | condition | injections | before the distillation | noticed after, s: median, most | steps lost "
        "| outcome |\n|---|---|---|---|---|---|---|"
    )
    for (fault, condition), records in sorted(groups.items()):
        seconds = sorted(row["noticed"] for row in records)
        lost = max((row["lost"] for row in records if row["lost"] is not None), default=0)
        early = sum(row["stage"] != "distill" for row in records)
        outcomes = ", ".join(f"{what} ({count})" for what, count in Counter(row["outcome"] for row in records).items())
        print(f"| {fault} | {condition or '–'} | {len(records)} | {early} | {seconds[len(seconds) // 2]:.1f}, "
              f"{seconds[-1]:.1f} | {lost} | {outcomes} |")  # fmt: skip
    bad = [row for row in injections if not row["kept"]] + [row for row in runs if not row["same"]]
    same = sum(row["same"] for row in runs)
    print(f"\n{len(injections)} injections in {len(runs)} finished runs; {same} students and curves equal to the "
          f"unbroken run's (with one node left: within rounding); {len(bad)} records that are wrong")  # fmt: skip
    for row in bad:
        print(json.dumps(row))
    return min(1, len(bad))
