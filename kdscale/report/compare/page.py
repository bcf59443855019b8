"""The page of a comparison: compare.json (every figure) and one compare.html that needs nothing but a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdscale.files import write_json, write_text
from kdscale.report.compare.runs import gather
from kdscale.report.html import model_class, page_environment
from kdscale.report.tradeoff.plots import tradeoffs
from kdscale.report.tradeoff.points import from_json
from kdscale.runs.models import TEACHER
from kdscale.units import format_count

_LONGEST = 120  # characters of a config's value


def write_comparison(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write compare.json and compare.html of these runs into `out`; returns the facts.

    Raises RunFolderError for a folder that is not there, or that cannot be written to.
    """
    facts = gather(folders)
    write_json(out / "compare.json", facts)
    write_text(out / "compare.html", render(facts))
    return facts


def render(facts: Mapping[str, Any]) -> str:
    """The page for the facts that `gather` returns. Equal facts give equal bytes."""
    environment = page_environment()
    environment.filters["value"] = _value
    environment.filters["shape"] = shape_text
    return environment.get_template("compare.html.j2").render(
        facts=facts,
        teacher=TEACHER,
        css=[model_class(model["name"]) for model in facts["models"]],
        tradeoffs=tradeoffs(from_json(facts["points"])),
        title=" · ".join(run["label"] for run in facts["runs"]),
        count=format_count,
    )


def shape_text(shape: Mapping[str, int] | None) -> str:
    """`30 layers · hidden 576 · ffn 704 · heads 6 · kv heads 2`; empty where it is not known."""
    if not shape:
        return ""
    rest = " · ".join(f"{axis.replace('_', ' ')} {size:,}" for axis, size in shape.items() if axis != "layers")
    return f"{shape['layers']} layers · {rest}" if "layers" in shape else rest


def _value(value: Any) -> str:
    text = "–" if value is None else f"{value:,}" if type(value) is int else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
