"""Where a rank stands among the others: torch's variables read and set aside, and how ranks wait for rank 0."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import struct
import sys
import time
from collections.abc import Mapping, MutableMapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdscale_launch.job import LaunchError, RankPlace

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SIOCGIFADDR = 0x8915
_RETRY_SECONDS = 1.0
_GREETING_SECONDS = 1.0
_NOTHING_TO_DO = b"kdscale: nothing to do\n"
_NAME_SECONDS = 300.0  # a cluster's name service may learn of rank 0's machine late


def listen_as_rank_0(environment: Mapping[str, str]) -> socket.socket:
    """A socket that listens on MASTER_ADDR:MASTER_PORT and on no other address, for the store in which ranks meet.

    It listens on every address of this machine, and says so, where the other hosts could not reach it otherwise:
    MASTER_ADDR is a name that this host takes for the loopback, or an address that something else translates.
    Raises LaunchError for a missing variable, or a port that cannot be used.
    """
    check_rank_variables(environment)
    one_host = environment["WORLD_SIZE"] == environment.get("LOCAL_WORLD_SIZE", "1")
    return _listen(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), one_host)


def _listen(master_addr: str, port: int, one_host: bool) -> socket.socket:
    """See `listen_as_rank_0`."""
    loopback_is_meant = one_host or master_addr == "localhost" or _is_loopback(master_addr)
    try:
        resolved = socket.getaddrinfo(master_addr, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR {master_addr} cannot be resolved: {error.strerror}") from error
    for family, _, _, _, address in sorted(resolved):  # IPv4 first: gloo and NCCL prefer it too
        if not loopback_is_meant and _is_loopback(str(address[0])):
            continue
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
        except OSError as error:
            listener.close()
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise LaunchError(f"rank 0 cannot listen on {master_addr}:{port}: {error.strerror}") from error
        else:
            return listener
    print(
        f"MASTER_ADDR {master_addr} is no address of this host that other hosts reach: rank 0 listens on port {port} of"
        " all its addresses; give it an address of the network between the hosts, or let a firewall close that port",
        file=sys.stderr,
    )
    return socket.create_server(("", port))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:  # a name
        return False


def take_rank_place(environment: MutableMapping[str, str]) -> str:
    """Remove torch's variables from `environment`; returns them as the text that `parse_rank_place` reads.

    Libraries that find RANK and WORLD_SIZE behave as parts of a group, which the single-process stages are not.
    Raises LaunchError when a variable is missing or not a number.
    """
    check_rank_variables(environment)
    place = RankPlace(
        first_rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        master_addr=environment["MASTER_ADDR"],
        master_port=int(environment["MASTER_PORT"]),
        first_local_rank=int(environment.get("LOCAL_RANK", "0")),
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
    )
    for name in {*_REQUIRED, *_NUMBERS}:
        environment.pop(name, None)
    return json.dumps(asdict(place))


def parse_rank_place(text: str) -> RankPlace:
    """The place that `take_rank_place` wrote as text."""
    return RankPlace(**json.loads(text))


def wait_for_rank_0(environment: Mapping[str, str]) -> bool:
    """Wait until rank 0 listens on MASTER_ADDR:MASTER_PORT; False when it answers that the stage was done before.

    Waits as long as it takes: rank 0 may prune for hours, and whoever started the ranks ends them when one fails.
    Raises LaunchError for a missing variable, or a name that cannot be resolved for _NAME_SECONDS.
    """
    check_rank_variables(environment)
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    name_deadline = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            with socket.create_connection(address, timeout=5.0) as connection:
                return not _told_to_leave(connection)
        except socket.gaierror as error:
            if time.monotonic() > name_deadline:
                raise LaunchError(f"MASTER_ADDR {address[0]} cannot be resolved: {error.strerror}") from error
        except OSError:
            name_deadline = float("inf")  # the name is known, nothing listens yet
        time.sleep(_RETRY_SECONDS)


def _told_to_leave(connection: socket.socket) -> bool:
    """torch's store waits for its client to speak first; `release_waiting_ranks` speaks at once."""
    connection.settimeout(_GREETING_SECONDS)
    try:
        return connection.recv(len(_NOTHING_TO_DO)) == _NOTHING_TO_DO
    except OSError:
        return False


def release_waiting_ranks(place: RankPlace, seconds: float = 300.0) -> None:
    """On rank 0, when there is nothing to distil: tell each waiting rank to leave, as it connects."""
    deadline = time.monotonic() + seconds
    one_host = place.world_size == (place.local_world_size or 1)
    with closing(_listen(place.master_addr, place.master_port, one_host)) as server:
        for _ in range(place.world_size - 1):
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                return
            with connection:
                connection.sendall(_NOTHING_TO_DO)


def set_interfaces(environment: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface through which this host reaches rank 0.

    One that is set, in NCCL's case also in a file of NCCL's own, stays as it is. Left alone, gloo takes the interface
    of the host's own name, which on many machines is the loopback, and NCCL the first that looks usable.
    """
    wanted = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}  # NCCL takes a name without "=" as a prefix
    missing = [name for name in wanted if name not in environment and not _in_nccl_files(name, environment)]
    interface = interface_towards(environment["MASTER_ADDR"]) if missing and "MASTER_ADDR" in environment else None
    if interface is not None:
        environment.update({name: wanted[name] + interface for name in missing})


def _in_nccl_files(name: str, environment: Mapping[str, str]) -> bool:
    """Whether a file that NCCL reads sets `name`; a variable of ours would override it."""
    own = environment.get("NCCL_CONF_FILE") or str(Path(environment.get("HOME", "/")) / ".nccl.conf")
    for file in (own, "/etc/nccl.conf"):
        try:
            lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue  # most hosts have neither
        if any(line.split("=")[0].strip() == name for line in lines):
            return True
    return False


def interface_towards(address: str) -> str | None:
    """The network interface through which this host reaches `address`; None when it is unknown, or not on Linux."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it only asks the routing table
            own_address = probe.getsockname()[0]
    except OSError:
        return None
    if not sys.platform.startswith("linux"):
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == own_address), None)


def _address_of(interface: str) -> str | None:
    """The IPv4 address of an interface; None when it has none."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request: Any = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:
            return None


def check_rank_variables(environment: Mapping[str, str]) -> None:
    """Raise LaunchError, naming them, when variables are missing or not numbers."""
    if missing := [name for name in _REQUIRED if name not in environment]:
        raise LaunchError(f"a launcher must set {', '.join(missing)}")
    for name in _NUMBERS:
        if not environment.get(name, "0").isdigit():
            raise LaunchError(f"{name}: expected a number, got {environment[name]!r}; whoever starts the ranks sets it")
