"""Finds the teacher: a local folder, or a hub model that is downloaded (what the student needs, nothing else)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from kdscale.config.root import TeacherConfig
from kdscale.errors import ConfigError, ServiceError
from kdscale.weights.sidecars import SIDECARS
from kdscale.weights.unreadable import INDEX_FILE, SINGLE_FILE

_HUB = "hf:"  # as in data.sources
_HUB_NAME = re.compile(
    r"(?:https?://(?:huggingface\.co|hf\.co)/(?:datasets/)?)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?"
)
_SHIPPED_FOLDERS = ("teachers", "data")  # where the configs that come with kdscale look for what is not theirs to ship
_DEMO = "smollm2-135m-instruct"  # packaging.catalog, which is not to be imported here

# What a checkpoint's folder keeps; never pickles or the other formats that some repositories carry beside it.
# The card, which is not copied into a student, tells the licence and the languages that it inherits.
_ALLOW = ["config.json", "README.md", SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors", *SIDECARS]
_IGNORE = [".*", "*/model-*", "*/*.py"]


def resolve_teacher(teacher: TeacherConfig, config_only: bool = False) -> Path:
    """Return the teacher's folder; `hf:org/name` is downloaded, or only its config.json when `config_only`.

    Without the prefix a path is a path: a mistyped one never turns into a request to the hub. Raises ConfigError when
    the path does not exist or is not a folder, ServiceError when the hub refuses the model or cannot be reached.
    """
    if teacher.path.startswith(_HUB):
        files = _ALLOW + (["*.py"] if teacher.trust_remote_code else [])
        return _download(teacher.path.removeprefix(_HUB), teacher.revision, ["config.json"] if config_only else files)
    path = _expand(teacher.path)
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(
            "teacher.path",
            expected="a folder with config.json, tokenizer and safetensors",
            got=f"the file {path}",
            hint=_how_to_convert(path),
        )
    raise ConfigError(
        "teacher.path",
        expected="an existing folder, or hf:org/name for a model from the hub",
        got=f"{teacher.path!r}: no such folder" + _nearest(path),
        hint=_how_to_get(teacher.path, path),
    )


def hub_name(text: str) -> str | None:
    """`org/name` when a path that does not exist looks like a name, or the address, of something on the hub."""
    found = _HUB_NAME.fullmatch(text)
    if found is None or Path(found[1]).parent.exists() or found[1].split("/")[0] in _SHIPPED_FOLDERS:
        return None
    return found[1]


def _how_to_get(text: str, path: Path) -> str:
    """What to do about a teacher's folder that does not exist."""
    if path.name == _DEMO:
        return f"get it: kdscale get-teacher {_DEMO} {shlex.quote(str(path))}"
    if name := hub_name(text):
        return f"did you mean hf:{name}? That fetches it from the hub"
    return (
        f"check the path, or put the model there: hf download ORG/{path.name} --local-dir {shlex.quote(str(path))}; "
        f"hf:ORG/{path.name} as the path fetches it too; the demo's teacher comes from "
        f"kdscale get-teacher {_DEMO} FOLDER"
    )


def _how_to_convert(path: Path) -> str:
    """What to do about a file in the place of a folder."""
    if path.suffix.lower() == ".gguf":
        folder = shlex.quote(str(path.with_suffix("")))
        return f"convert it once: kdscale get-teacher {shlex.quote(str(path))} {folder}, and give that folder"
    return "convert single-file formats to a Hugging Face folder first"


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of a user who is not known here: then it is a path that does not exist
        return Path(text)


def _nearest(path: Path) -> str:
    """The deepest folder of the path that does exist, so that the mistyped part is seen at once."""
    for parent in path.parents:
        if parent.is_dir() and str(parent) != ".":
            return f" (the folder {parent} exists)"
    return ""


def hub_connection_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub cannot be reached or does not answer."""
    from huggingface_hub import errors

    # Connections that break off raise the HTTP client's own errors, and which client the library uses has changed
    # (requests, httpx, httpx2): its base is the first base of the library's.
    client_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    return (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError, client_error)


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    where = f"teacher.path: hub model {name}" + (f" at revision {revision}" if revision else "")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=_IGNORE))
    except errors.HFValidationError as error:
        raise ConfigError("teacher.path", expected="a folder, or hf:org/name", got=str(error)) from error
    except errors.GatedRepoError as error:
        hint = "accept its licence on the hub and log in with `hf auth login`, then run again"
        raise ServiceError(f"{where} is gated", got="access refused", hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; a private model needs `hf auth login`; a local folder is given without hf:"
        raise ServiceError(f"{where} does not exist or is private", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise ServiceError(f"{where} does not exist", hint="check teacher.revision") from error
    except hub_connection_errors() as error:
        raise ServiceError(
            f"{where} cannot be downloaded and is not in the local cache",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="check the network and HF_HUB_OFFLINE, or give a local folder",
        ) from error
