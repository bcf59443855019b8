"""What a student inherits: the teacher it comes from, its licence and languages, and the data sets of its text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale.config.root import Config
from kdscale.errors import FileError
from kdscale.files import read_bytes, read_json
from kdscale.packaging import front_matter
from kdscale.packaging.catalog import MANIFEST, NAMES

_HUB = "hf:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WORD = re.compile(r"[\w.+-]{1,100}", re.ASCII)  # names of licences and languages
_MOST_CARD_BYTES, _MOST_LICENCE_BYTES = 4 << 20, 1 << 20
_LICENCE_FILES = ("LICENSE*", "LICENCE*")

# A hub's name of a licence, and what its text says near its beginning, in capitals and with single spaces.
_LICENCE_TEXTS = {
    "apache-2.0": "APACHE LICENSE VERSION 2.0",
    "mit": "PERMISSION IS HEREBY GRANTED, FREE OF CHARGE, TO ANY PERSON OBTAINING A COPY",
    "llama2": "LLAMA 2 COMMUNITY LICENSE",
    "llama3": "META LLAMA 3 COMMUNITY LICENSE",
    "llama3.1": "LLAMA 3.1 COMMUNITY LICENSE",
    "llama3.2": "LLAMA 3.2 COMMUNITY LICENSE",
    "llama3.3": "LLAMA 3.3 COMMUNITY LICENSE",
    "gemma": "GEMMA TERMS OF USE",
}
_LICENCE_HEAD = 2000  # characters of the text that are looked at


@dataclass(frozen=True)
class Origin:
    """What the front matter of a student's card says of where it comes from; empty where that is not known."""

    base_model: str = ""  # a name on the hub
    licence: Mapping[str, str] | None = None  # license, and for an uncommon one license_name and license_link
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()  # names on the hub

    def fields(self) -> dict[str, Any]:
        """The fields of the front matter, in the order in which hubs show them."""
        found = {
            **(self.licence or {}), "base_model": self.base_model, "language": list(self.languages),
            "datasets": list(self.datasets),
        }  # fmt: skip
        return {name: value for name, value in found.items() if value}


def origin_of(cfg: Config, student: Path) -> Origin:
    """Where the student of a run comes from, by the teacher's own files; downloads nothing.

    `student`: a folder with the licence files that were copied from the teacher, whose text tells the licence where
    the teacher's card does not.
    """
    hub = cfg.teacher.path.removeprefix(_HUB) if cfg.teacher.path.startswith(_HUB) else ""
    card = _card(_teacher_card(cfg, hub))
    entry = NAMES.get(_catalog_name(Path(cfg.teacher.path))) if not hub else None
    licence = {
        name: value
        for name in ("license", "license_name", "license_link")
        if isinstance(value := card.get(name), str) and len(value) <= 300 and value.isprintable()
    }
    if not _WORD.fullmatch(licence.get("license", "")):
        known = entry.licence.lower() if entry else licence_by_text(student)
        licence = {"license": known} if known else {}
    languages = card.get("language")
    listed = languages if isinstance(languages, list) else [languages]
    datasets = [source.path.removeprefix(_HUB).partition("#")[0] for source in cfg.data.sources if _is_hub(source.path)]
    return Origin(
        base_model=hub if _HUB_NAME.fullmatch(hub) else entry.base_model if entry else "",
        licence=licence,
        languages=tuple(item for item in listed if isinstance(item, str) and _WORD.fullmatch(item))
        or (entry.languages if entry else ()),
        datasets=tuple(dict.fromkeys(name for name in datasets if _HUB_NAME.fullmatch(name))),
    )


def licence_by_text(folder: Path) -> str:
    """The hub's name of the licence whose text a folder holds; "" where there is none, or one that is not known."""
    for path in sorted(item for pattern in _LICENCE_FILES for item in folder.glob(pattern) if item.is_file()):
        head = read_bytes(path, limit=_MOST_LICENCE_BYTES).decode("utf-8", "replace")[:_LICENCE_HEAD]
        text = " ".join(head.upper().split())
        for name, mark in _LICENCE_TEXTS.items():
            if mark in text:
                return name
    return ""


def _is_hub(path: str) -> bool:
    return path.startswith(_HUB)


def _teacher_card(cfg: Config, hub: str) -> Path | None:
    """The teacher's README.md: beside a local teacher, or in the hub's cache."""
    if not hub:
        return Path(cfg.teacher.path) / "README.md"
    if not _HUB_NAME.fullmatch(hub):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, "README.md", revision=cfg.teacher.revision)
    return Path(found) if isinstance(found, str) else None


def _card(path: Path | None) -> Mapping[str, Any]:
    """The front matter of the teacher's card; {} for a card that is not there, or cannot be read: it is no input."""
    if path is None or not path.is_file():
        return {}
    try:
        text = read_bytes(path, limit=_MOST_CARD_BYTES).decode("utf-8", "replace")
        return front_matter.split(text, str(path))[0]
    except FileError:
        return {}


def _catalog_name(teacher: Path) -> str:
    """The name in kdscale's catalog of a teacher that `kdscale get-teacher` made; "" for any other."""
    path = teacher / MANIFEST
    try:
        return str(read_json(path, expect=dict).get("name")) if path.is_file() else ""
    except FileError:  # it is no input either
        return ""
