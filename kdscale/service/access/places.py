"""Which files, hosts and hub names a config may name: inside the settings' roots and hosts, and nowhere else.

Every function returns what is wrong as (expected, to do), or None.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from urllib.parse import urlsplit

from kdscale.service.settings import ServiceSettings

Wrong = tuple[str, str] | None
# With an owner: a name without one may be a reader of `datasets` ("text", "csv"), which reads the process's own folder.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:#[\w.+-]*)?", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_MOST_SHOWN = 5  # roots in a message
_ASK = "ask whoever runs the service to list it in its settings, or to submit the run"


def wrong_hub_name(name: str) -> Wrong:
    """What is wrong with a name on the hub (behind `hf:`); a folder of that name would be read instead."""
    if _HUB_NAME.fullmatch(name) is None or Path(name.partition("#")[0]).exists():
        return "hf:OWNER/NAME of something on the hub", "give the name with its owner"
    return None


def wrong_to_read(path: str, settings: ServiceSettings) -> Wrong:
    """What is wrong with a file, a folder or a glob of files that is read."""
    return _outside(path, settings, settings.runs)


def wrong_to_write(path: str, settings: ServiceSettings) -> Wrong:
    """What is wrong with a folder that is written to: not among the runs either."""
    return _outside(path, settings)


def _outside(text: str, settings: ServiceSettings, also: Path | None = None) -> Wrong:
    """What is wrong with a path that must be in one of the roots, or in `also`, which is in the service's home."""
    listed = ", ".join(settings.roots[:_MOST_SHOWN]) + (", …" if len(settings.roots) > _MOST_SHOWN else "")
    wrong = f"a path inside one of the service's roots ({listed or 'it has none'})", _ASK
    if text.startswith("~") or _SCHEME.match(text) or ".." in Path(text).parts:
        return f"{wrong[0]}, without ~, .. and a scheme", "write the whole path"
    # an engine may count relative paths from another folder than this process
    folders = [Path.cwd(), *(Path(str(one["cwd"])) for one in settings.engines.values() if one.get("cwd"))]
    try:
        home, roots = settings.folder.resolve(), [Path(root).resolve() for root in settings.roots]
        paths = {(folder / _fixed_part(Path(text))).resolve() for folder in folders}
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long
        return wrong
    if also is not None and all(path.is_relative_to(also.resolve()) for path in paths):
        return None
    if not all(any(path.is_relative_to(root) for root in roots) for path in paths):
        return wrong
    # its key, its tokens, its database
    if any(path.is_relative_to(home) or home.is_relative_to(path) for path in paths):
        return f"{wrong[0]}, but not the service's own, nor one that it is in", "name another folder"
    return None


def _fixed_part(path: Path) -> Path:
    """The part of a glob before its first wildcard; all of any other path."""
    parts: list[str] = []
    for part in path.parts:
        if glob.has_magic(part) and not path.exists():
            break
        parts.append(part)
    return Path(*parts)


def wrong_address(url: str, settings: ServiceSettings) -> Wrong:
    """What is wrong with the address of a server: its host must be one of `endpoint_hosts`, as HOST or HOST:PORT."""
    names = ", ".join(settings.endpoint_hosts)
    wrong = f"http(s)://HOST with a host of the service's endpoint_hosts ({names or 'none'})", _ASK
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return wrong
    if parts.scheme not in ("http", "https") or "@" in parts.netloc or "\\" in url or not host:
        return wrong
    allowed = {name.lower() for name in settings.endpoint_hosts}
    port = port or {"http": 80, "https": 443}[parts.scheme]
    shown = f"[{host}]" if ":" in host else host
    return None if {host, shown, f"{shown}:{port}"} & allowed else wrong


def wrong_key(variable: str, url: str, settings: ServiceSettings) -> Wrong:
    """What is wrong with sending the key of an environment variable of the service to this address."""
    host = urlsplit(url).hostname or ""
    if variable in settings.endpoint_keys.get(host, ()):
        return None
    return f"a variable that the service's endpoint_keys list for {host or 'the host'}", _ASK
