"""The log of the service: on standard error and in service.log, as text or as one JSON object a line.

Every line has the id of the request that it belongs to. No line holds a token, a password or a key: what looks like one
is replaced at the last moment, whoever wrote it; and none holds a line break or an escape sequence that somebody sent.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from kdscale.errors import RunFolderError
from kdscale.escaping import for_terminal
from kdscale.files import explain_os_errors
from kdscale.service.redaction import redacted_text
from kdscale.service.request_ids import request_id
from kdscale.service.settings import ServiceSettings

LOG_FILE = "service.log"
_FILE_BYTES, _FILES = 20 << 20, 5
_LONGEST_LINE = 32_000  # characters of one message
# Libraries that say much about every request: only what is wrong.
_QUIET = (
    "uvicorn.access",
    "alembic",
    "sqlalchemy.engine",
    "httpx",
    "httpcore",
    "sse_starlette",
    "multipart",
    "asyncio",
)


class TextFormatter(logging.Formatter):
    """`time level logger [request] message`, and below it what was raised."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the lines of a traceback, each behind two spaces."""
        of_request = f" [{item}]" if (item := _request_of(record)) else ""
        line = f"{_time(record)} {record.levelname.lower()} {record.name}{of_request} {_message(record)}"
        return "\n  ".join([line, *_raised(record)])


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, message, request_id, fields of the record's own, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of ASCII."""
        raised = _raised(record)
        entry: dict[str, Any] = {
            "time": _time(record), "level": record.levelname.lower(), "logger": record.name,
            "message": _message(record),
            **({"request_id": item} if (item := _request_of(record)) else {}),
            **_own_fields(record),
            **({"exception": "\n".join(raised)} if raised else {}),
        }  # fmt: skip
        return json.dumps(entry)


def _own_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra={"fields": {...}}`: figures of a request, for whoever counts them."""
    fields = getattr(record, "fields", None) or {}
    return {
        str(name): redacted_text(value)[:_LONGEST_LINE] if isinstance(value, str) else value
        for name, value in fields.items()
        if isinstance(value, str | int | bool) or (isinstance(value, float) and value - value == 0.0)
    }


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError) as error:  # a message whose arguments do not fit is a bug that must not hide it
        text = f"{record.msg} ({type(error).__name__} while it was written)"
    text = for_terminal(redacted_text(text)).replace("\n", "\\n").replace("\t", " ")
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}… ({len(text):,} characters)"


def _raised(record: logging.LogRecord) -> list[str]:
    """The lines of the traceback, without control characters and secrets."""
    if not record.exc_info or record.exc_info[0] is None:
        return []
    return for_terminal(redacted_text("".join(traceback.format_exception(*record.exc_info)))).rstrip().split("\n")


def _request_of(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", "")) or request_id()


def set_up_logs(settings: ServiceSettings, stream: TextIO | None = None) -> None:
    """Send everything that is logged in this process to `stream` (standard error) and to service.log.

    The file is readable by its owner alone; at 20 MiB a new one is begun, and five are kept. Raises RunFolderError
    where it cannot be written.
    """
    formatter = JsonFormatter() if settings.log_format == "json" else TextFormatter()
    path = settings.folder / LOG_FILE
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise RunFolderError(f"{path} is not a regular file", hint="move it away")
        handlers: list[logging.Handler] = [logging.StreamHandler(stream or sys.stderr), _PrivateFile(path)]
    root = logging.getLogger()
    for old in root.handlers[:]:
        if getattr(old, "of_service", False):
            root.removeHandler(old)
            old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.of_service = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    level = getattr(logging, settings.log_level.upper())
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.raiseExceptions = False  # a full disk must not fill standard error with tracebacks about the log


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """service.log, which names runs and people: for its owner alone."""

    def __init__(self, path: Path):
        super().__init__(path, maxBytes=_FILE_BYTES, backupCount=_FILES - 1, encoding="utf-8", errors="replace")

    def _open(self) -> Any:
        def private(name: str, flags: int) -> int:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=private)
