"""Docs that must not fall behind the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from kdscale.config.root import Config

ROOT = Path(__file__).resolve().parents[2]


def fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    out: list[str] = []
    for name, field in model.model_fields.items():
        inner = [arg for arg in getattr(field.annotation, "__args__", ()) if isinstance(arg, type)]
        nested = next(
            (kind for kind in (field.annotation, *inner) if isinstance(kind, type) and issubclass(kind, BaseModel)),
            None,
        )
        out += fields(nested, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return out


def test_every_field_is_documented_and_every_documented_field_exists() -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    listed = set(
        re.findall(
            r"`([a-z_]+(?:\.[a-z_]+)*)`",
            "\n".join(row.split("|")[1] for row in text.splitlines() if row.startswith("| `")),
        )
    )
    known = {name.replace("heldout_sources.", "sources.") for name in fields(Config)}
    assert known - listed == set()
    assert listed - known - {"data.sources", "data.heldout_sources"} == set()


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page} links to {target}"
