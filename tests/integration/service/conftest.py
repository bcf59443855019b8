"""A Postgres server of the tests' own, in a folder of its own, that nothing but this machine's user can reach."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_PROGRAMS = ("initdb", "pg_ctl", "postgres")
_SECONDS = 60


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """Makes empty databases: each call gives the URL of a new one. Skips where Postgres is not installed."""
    pytest.importorskip("psycopg")
    programs = [shutil.which(name) for name in _PROGRAMS]
    if None in programs:
        pytest.skip(f"needs {', '.join(_PROGRAMS)}")
    initdb, pg_ctl, _ = map(str, programs)
    user = _ordinary_user()
    if user is None:
        pytest.skip("Postgres does not run as root, and there is no other user")
    folder = Path(tempfile.mkdtemp(prefix="kdscale-pg-", dir="/tmp"))  # short: it holds a socket
    os.chown(folder, user.pw_uid, user.pw_gid)

    def run(*command: str) -> None:
        # output goes to a file: the server keeps the pipe of whoever started it open
        with (folder / "output.txt").open("ab") as output:
            done = subprocess.run(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=folder, timeout=_SECONDS,
                check=False, **({"user": user.pw_uid, "group": user.pw_gid} if os.geteuid() == 0 else {}),
            )  # fmt: skip
        assert done.returncode == 0, (folder / "output.txt").read_text()[-4000:]

    data = str(folder / "data")
    try:
        run(initdb, "-D", data, "-U", "kdscale", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
        options = f"-c listen_addresses= -k {folder} -c fsync=off -c max_connections=60 -c shared_buffers=16MB"
        run(pg_ctl, "-D", data, "-w", "-t", str(_SECONDS), "-l", str(folder / "server.txt"), "-o", options, "start")
        try:
            yield _maker(folder)
        finally:
            run(pg_ctl, "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _ordinary_user() -> pwd.struct_passwd | None:
    """Who runs the server: we, or somebody less where we are root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


def _maker(folder: Path) -> Callable[[], str]:
    numbers = itertools.count(1)

    def make() -> str:
        import psycopg

        name = f"test{next(numbers)}"
        with psycopg.connect(f"host={folder} user=kdscale dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://kdscale@/{name}?host={folder}"

    return make
