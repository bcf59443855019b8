"""DeepSpeed's hostfile: one `host slots=N` per line, comments from #."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdscale_launch.job import LaunchError

_MOST_BYTES, _MOST_PROBLEMS = 1 << 20, 20
_LINE = re.compile(r"(\S+)[ \t]+slots=([0-9]{1,6})")
# What ssh may be given as a destination. No leading dash: ssh would take it for an option.
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9.:_%-]*")


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks (GPUs) it takes. Raises LaunchError for what is no host name."""

    name: str
    slots: int

    def __post_init__(self) -> None:
        check_host_name("host", self.name)

    @property
    def address(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]


def parse_hostfile(text: str, origin: str = "hostfile") -> tuple[Host, ...]:
    """The hosts in order; rank 0 runs on the first. Raises LaunchError naming every wrong line."""
    hosts: list[Host] = []
    problems: list[str] = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.partition("#")[0].strip(" \t\r")
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"line {number}: expected `host slots=N`, got {line[:200]!r}")
        elif not _NAME.fullmatch(match[1]):
            problems.append(f"line {number}: {match[1][:200]!r} is not a host name")
        elif int(match[2]) < 1:
            problems.append(f"line {number}: {match[1]} has no slots")
        elif any(host.name == match[1] for host in hosts):
            problems.append(f"line {number}: {match[1]} is listed twice")
        else:
            hosts.append(Host(match[1], int(match[2])))
    if not hosts and not problems:
        problems.append("it lists no host")
    if problems:
        shown = problems[:_MOST_PROBLEMS] + ["…"] * (len(problems) > _MOST_PROBLEMS)
        raise LaunchError(f"{origin} cannot be used:\n" + "\n".join(f"  - {problem}" for problem in shown))
    return tuple(hosts)


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file. Raises LaunchError when it cannot be read or has a wrong line."""
    try:
        if not path.is_file() and path.exists():
            raise LaunchError(f"hostfile {path} is not a regular file")
        with path.open("rb") as stream:
            raw = stream.read(_MOST_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise LaunchError(f"hostfile {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LaunchError(f"hostfile {path} is not UTF-8 text") from error
    if len(raw) > _MOST_BYTES:
        raise LaunchError(f"hostfile {path} is too large: at most {_MOST_BYTES:,} bytes")
    return parse_hostfile(text, str(path))


def check_host_name(what: str, name: str) -> None:
    """Raise LaunchError, naming `what`, for a text that is no host name or address, with or without a user."""
    if not _NAME.fullmatch(name):
        raise LaunchError(f"{what}: expected the name or address of a host, got {name[:200]!r}")


def total_slots(hosts: Sequence[Host]) -> int:
    """The number of ranks on all hosts together."""
    return sum(host.slots for host in hosts)


def first_ranks(hosts: Sequence[Host]) -> list[int]:
    """The first global rank of each host."""
    return [total_slots(hosts[:index]) for index in range(len(hosts))]
