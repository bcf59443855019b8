"""What a run has made: a list of its files, each file, whole folders as one download, and the report."""

from __future__ import annotations

import itertools
import os
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from kdscale.runs.folder import REPORT
from kdscale.service.access.headers import DOCUMENT_HEADERS
from kdscale.service.api.dependencies import READ, FoundRun, Words
from kdscale.service.api.files.archives import MEDIA_TYPES, Format, archive, tar_bytes
from kdscale.service.api.files.content import Digests, answer, key_of, open_file
from kdscale.service.api.files.folder import RunFile, files_under, resolved
from kdscale.service.api.schemas import ArtifactEntry, ListOf
from kdscale.service.problems import Problem

router = APIRouter(prefix="/v1/runs", tags=["artifacts"], dependencies=[READ])
_HASHED_AT_ONCE = 256 << 20  # bytes that are read for one list
_BINARY = "application/octet-stream"
After = Annotated[Words | None, Query(description="The `next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/{run_id}/artifacts")
def artifacts(
    run: FoundRun, request: Request, under: Annotated[Words, Query(description="Only this folder.")] = "",
    after: After = None, limit: Limit = 500,
) -> ListOf[ArtifactEntry]:  # fmt: skip
    """The files of a run, by path."""
    return _list(request, run.folder, under, after, limit)


@router.head("/{run_id}/artifacts/{path:path}", include_in_schema=False)
@router.get("/{run_id}/artifacts/{path:path}", response_model=None, responses={200: {"content": {_BINARY: {}}}})
def artifact(
    run: FoundRun, path: str, request: Request,
    download: Annotated[Format | None, Query(description="A folder as one file.")] = None, after: After = None,
    limit: Limit = 500,
) -> Any:  # fmt: skip
    """A file, with ranges and its SHA-256 as ETag; or the list of a folder, or the folder as one tar or zip."""
    place = resolved(run.folder, path)
    if place.is_dir():
        if download is not None:
            return _archive(request, run.folder, path, download, f"{run.name}-{run.id}")
        return _list(request, run.folder, path, after, limit)
    return answer(request, place, digests_of(request), {**DOCUMENT_HEADERS, **_saved_as(place.name, _BINARY)})


@router.head("/{run_id}/report", include_in_schema=False)
@router.get("/{run_id}/report", response_model=None, responses={200: {"content": {"text/html": {}}}})
def report(run: FoundRun, request: Request) -> Response:
    """The run's report, as a page of its own that may load and run nothing."""
    place = run.folder / REPORT.path / "report.html"
    if not place.is_file():
        raise Problem(404, "not-found", "the run has no report yet", hint="the last stage of a run writes it")
    path = resolved(run.folder, f"{REPORT.path}/report.html")
    return answer(request, path, digests_of(request), {**DOCUMENT_HEADERS, "content-type": "text/html; charset=utf-8"})


def digests_of(request: Request) -> Digests:
    """The digests that the application knows."""
    state = request.app.state
    if getattr(state, "digests", None) is None:
        state.digests = Digests()
    found: Digests = state.digests
    return found


def _list(request: Request, folder: Path, under: str, after: str | None, limit: int) -> ListOf[ArtifactEntry]:
    if not folder.is_dir():
        return ListOf(items=[])
    behind = (file for file in files_under(folder, under) if after is None or file.path > after)
    page = list(itertools.islice(behind, limit + 1))
    budget, digests, entries = _HASHED_AT_ONCE, digests_of(request), []
    for file in page[:limit]:
        digest = digests.known(key_of(file.found))
        if digest is None and file.found.st_size <= budget:
            budget -= file.found.st_size
            digest = _digest(file, digests)
        modified = datetime.fromtimestamp(file.found.st_mtime, UTC)
        entries.append(ArtifactEntry(path=_shown(file), bytes=file.found.st_size, modified=modified, sha256=digest))
    return ListOf(items=entries, next=_shown(page[limit - 1]) if len(page) > limit else None)


def _shown(file: RunFile) -> str:
    """Its path as JSON can have it; one that is not UTF-8 cannot be asked for."""
    return file.path.encode("utf-8", "replace").decode()


def _digest(file: RunFile, digests: Digests) -> str | None:
    try:
        with open_file(file.place) as stream:
            same = key_of(os.fstat(stream.fileno())) == key_of(file.found)
            # that of other bytes than the entry tells of would be of no use
            return digests.of(stream.fileno(), file.found) if same else None
    except Problem:  # removed meanwhile
        return None


def _archive(request: Request, folder: Path, path: str, format_: Format, name: str) -> Response:
    inside = PurePosixPath(path)
    files = files_under(folder, str(inside))
    headers = {**DOCUMENT_HEADERS, **_saved_as(f"{name}-{inside.name}.{format_}", MEDIA_TYPES[format_])}
    if format_ == "tar":
        headers["content-length"] = str(tar_bytes(files, str(inside)))
    if request.method == "HEAD":
        return Response(headers=headers)
    return StreamingResponse(archive(files, str(inside), format_), headers=headers)


def _saved_as(name: str, media_type: str) -> dict[str, str]:
    """Headers by which a browser saves a file and does not show it."""
    encoded = quote(name.encode("utf-8", "replace"), safe="")
    return {"content-type": media_type, "content-disposition": f"attachment; filename*=UTF-8''{encoded}"}
