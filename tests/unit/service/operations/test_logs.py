"""The service's log: every line whole, of its request, without secrets."""

from __future__ import annotations

import io
import json
import logging
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import RunFolderError
from kdscale.service.operations.logs import LOG_FILE, set_up_logs
from kdscale.service.request_ids import CURRENT
from kdscale.service.settings import ServiceSettings

TOKEN = "kds_" + "Ab3-_x" * 7


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Callable[..., io.StringIO]]:
    root = logging.getLogger()
    handlers, level, noisy = root.handlers[:], root.level, logging.raiseExceptions
    quiet = {name: logging.getLogger(name).level for name in ("alembic", "httpx")}

    def set_up(**settings: Any) -> io.StringIO:
        stream = io.StringIO()
        set_up_logs(ServiceSettings(home=str(tmp_path), **settings), stream)
        return stream

    yield set_up
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    logging.raiseExceptions = noisy
    for name, value in quiet.items():
        logging.getLogger(name).setLevel(value)


def raise_in(logger: logging.Logger, words: str) -> None:
    try:
        raise ValueError(words)
    except ValueError:
        logger.exception("it went wrong")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_secret_is_in_any_line_whoever_writes_it(
    logged: Callable[..., io.StringIO], tmp_path: Path, log_format: Any
) -> None:
    stream = logged(log_format=log_format)
    logger = logging.getLogger("anybody")
    logger.warning("token %s, Authorization: Bearer abcdefghijklmnop, whsec_c2VjcmV0c2VjcmV0", TOKEN)
    logger.warning("https://ada:hunter2@host.example/?token=abc123", extra={"fields": {"to": f"x {TOKEN}"}})
    raise_in(logger, f"{TOKEN} https://u:hunter2@host.example/")
    text = stream.getvalue() + (tmp_path / LOG_FILE).read_text()
    for secret in (TOKEN, "abcdefghijklmnop", "c2VjcmV0c2VjcmV0", "hunter2", "abc123"):
        assert secret not in text
    assert text.count("***") >= 12


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_that_is_sent_makes_a_line_of_its_own(logged: Callable[..., io.StringIO], log_format: Any) -> None:
    stream = logged(log_format=log_format)
    logging.getLogger("anybody").warning("name: %s", "x\n2026-01-01 error forged\r\n\x1b[2J\u202e\u2028")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_a_json_line_has_its_fields(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(log_format="json")
    token = CURRENT.set("request-1")
    logging.getLogger("kdscale.x").warning("%d done", 3, extra={"fields": {"status": 200, "nan": float("nan")}})
    raise_in(logging.getLogger("kdscale.x"), "why")
    CURRENT.reset(token)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert {"level": "warning", "logger": "kdscale.x", "message": "3 done", "status": 200}.items() <= first.items()
    assert first["request_id"] == second["request_id"] == "request-1" and "nan" not in first
    assert first["time"].endswith("Z") and second["exception"].endswith("ValueError: why")


def test_a_traceback_is_set_in_below_its_line(logged: Callable[..., io.StringIO]) -> None:
    stream = logged()
    raise_in(logging.getLogger("kdscale.x"), "why")
    first, *others = stream.getvalue().splitlines()
    assert "error kdscale.x it went wrong" in first
    assert others and all(line.startswith("  ") for line in others)


def test_levels_and_libraries(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(log_level="warning")
    logging.getLogger("kdscale.x").info("quiet")
    assert stream.getvalue() == ""
    stream = logged(log_level="info")
    logging.getLogger("httpx").info("quiet")
    logging.getLogger("kdscale.x").info("once")
    assert stream.getvalue().count("once") == 1 and "quiet" not in stream.getvalue()


def test_a_message_whose_arguments_do_not_fit_is_still_told(logged: Callable[..., io.StringIO]) -> None:
    stream = logged()
    logging.getLogger("kdscale.x").warning("%d of %s", *["three"])
    assert "%d of %s" in stream.getvalue()


def test_the_file_is_its_owners_alone_and_no_link_is_followed(
    logged: Callable[..., io.StringIO], tmp_path: Path
) -> None:
    logged()
    assert stat.S_IMODE((tmp_path / LOG_FILE).stat().st_mode) == 0o600
    (tmp_path / LOG_FILE).unlink()
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / LOG_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="not a regular file"):
        logged()
