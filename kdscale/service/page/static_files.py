"""The page's style, scripts and icon: read once, and kept by browsers until their content changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from kdscale.service.problems import Problem

_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".txt": "text/plain"}
_FILES = {
    path.name: path.read_bytes()
    for path in sorted((Path(__file__).parent / "static").iterdir())
    if path.suffix in _TYPES
}
# in the address of every file, so that a browser may keep what it has for good
DIGEST = hashlib.sha256(b"".join(_FILES.values())).hexdigest()[:12]

router = APIRouter(include_in_schema=False)


@router.get("/static/{name}")
def static_file(name: str, request: Request) -> Response:
    """One of the files; nothing else is ever read from the disk."""
    if name not in _FILES:
        raise Problem(404, "not-found", f"there is no file {name[:80]!r}")
    kept = "public, max-age=31536000, immutable" if request.url.query == DIGEST else "no-cache"
    return Response(_FILES[name], media_type=_TYPES[Path(name).suffix], headers={"Cache-Control": kept})
