"""Puts a package on the model hub, file by file as its checksums list them, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale.errors import ConfigError, FileError, ServiceError
from kdscale.packaging.bundle.checksums import SUMS, verified_files
from kdscale.packaging.bundle.contents import read_package
from kdscale.weights.locate import hub_connection_errors

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

_LOG_IN = "check its name, and log in with `hf auth login` or set HF_TOKEN, with a token that may write there"


@dataclass(frozen=True)
class Upload:
    """A package whose files were verified, and where it is to go."""

    folder: Path
    files: tuple[str, ...]
    nbytes: int
    repository: str
    private: bool
    left_out: tuple[str, ...]  # files of the folder that are no part of the package


def prepare(folder: Path, repository: str, private: bool) -> Upload:
    """Verify a package. Raises ConfigError (no package, no name of a repository) and FileError (changed files)."""
    if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ConfigError("--to", expected="ORG/NAME, a repository of the hub", got=repr(repository)[:200])
    read_package(folder)
    listed = verified_files(folder)
    if SUMS in listed:
        raise FileError(f"{folder / SUMS} lists itself", hint="make the package again: kdscale package RUN")
    files = (*listed, SUMS)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return Upload(
        folder, files, sum((folder / name).stat().st_size for name in files), repository, private,
        tuple(sorted(there - set(files))),
    )  # fmt: skip


def already_there(api: Any, repository: str) -> Sequence[str] | None:
    """The files that the repository has; None where there is none. Raises ServiceError."""
    from huggingface_hub import errors

    try:
        with _explained(repository):
            return list(api.list_repo_files(repository))
    except ServiceError as error:
        if isinstance(error.__cause__, errors.RepositoryNotFoundError):
            return None
        raise


def upload(api: Any, item: Upload, message: str) -> str:
    """Make the repository where there is none, and add the files in one commit; returns its address.

    Files of the repository that the package lacks stay. Raises ServiceError.
    """
    from huggingface_hub import CommitOperationAdd

    with _explained(item.repository):
        api.create_repo(item.repository, private=item.private, exist_ok=True, repo_type="model")
        added = [CommitOperationAdd(name, item.folder / name) for name in item.files]
        commit = api.create_commit(item.repository, added, commit_message=message, repo_type="model")
    return str(commit.repo_url if hasattr(commit, "repo_url") else commit)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what the hub's library raises into ServiceError; no message of it holds the token."""
    from huggingface_hub import errors

    what = f"the hub's repository {repository}"
    unreachable: tuple[type[Exception], ...] = (*hub_connection_errors(), errors.OfflineModeIsEnabled, OSError)
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise ServiceError(f"{what} does not exist, or you have no access to it", hint=_LOG_IN) from error
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        refused = code in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)
        raise ServiceError(f"{what} refuses", got=_first_line(error), hint=_LOG_IN if refused else None) from error
    except unreachable as error:
        raise ServiceError(
            f"{what} cannot be reached", got=_first_line(error),
            hint="check the network and HF_HUB_OFFLINE, then give the same command again",
        ) from error  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
