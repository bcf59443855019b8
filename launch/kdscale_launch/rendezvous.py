"""A rank's place in torch's environment variables: read, taken out of the way, and waited for."""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict
from typing import Any

from kdscale_launch.job import LaunchError, RankPlace

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_TAKEN = (*_NEEDED, "LOCAL_RANK", "LOCAL_WORLD_SIZE")


_SIOCGIFADDR = 0x8915


_KNOCK_SECONDS = 1.0


_SPEAK_SECONDS = 1.0


_NOTHING_TO_DO = b"kdscale: nothing to do\n"


_NAME_SECONDS = 300.0  # a cluster's name service may learn of rank 0's machine late


def take_rank_place(environment: MutableMapping[str, str]) -> str:
    """Remove torch's variables from `environment` and return them as the text that `parse_rank_place` reads.

    Libraries that find RANK and WORLD_SIZE behave as parts of a group, which the single-process stages are not.
    """
    _require(environment)
    place = RankPlace(
        first_rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        master_addr=environment["MASTER_ADDR"],
        master_port=int(environment["MASTER_PORT"]),
        first_local_rank=int(environment.get("LOCAL_RANK", "0")),
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
    )
    for name in _TAKEN:
        environment.pop(name, None)
    return json.dumps(asdict(place))


def parse_rank_place(text: str) -> RankPlace:
    return RankPlace(**json.loads(text))


def wait_for_rank_0(environment: Mapping[str, str]) -> bool:
    """Whether there is work: True when rank 0 listens on MASTER_ADDR:MASTER_PORT for the distill stage, False when it
    says there that the stage was done before.

    Waits as long as it takes: rank 0 may prune for hours, and whoever started the ranks ends them when one fails.
    """
    _require(environment)
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    named_by = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            with socket.create_connection(address, timeout=5.0) as door:
                return not _told_to_leave(door)
        except socket.gaierror as error:
            if time.monotonic() > named_by:
                raise LaunchError(f"MASTER_ADDR {address[0]} cannot be resolved: {error.strerror}") from error
        except OSError:
            named_by = float("inf")  # the name is known, nothing listens yet
        time.sleep(_KNOCK_SECONDS)


def _told_to_leave(door: socket.socket) -> bool:
    """torch's store waits for its client to speak first; `release` speaks at once."""
    door.settimeout(_SPEAK_SECONDS)
    try:
        return door.recv(len(_NOTHING_TO_DO)) == _NOTHING_TO_DO
    except OSError:
        return False


def release_waiting_ranks(place: RankPlace, seconds: float = 300.0) -> None:
    """On rank 0, when there was nothing to distil: send the waiting ranks home, each as it knocks."""
    deadline = time.monotonic() + seconds
    with socket.create_server(("", place.master_port)) as server:
        for _ in range(place.world_size - 1):
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                visitor, _ = server.accept()
            except TimeoutError:
                return
            with visitor:
                visitor.sendall(_NOTHING_TO_DO)


def set_gloo_interface(environment: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME, where nobody did, to the interface through which this host reaches rank 0.

    Left alone, gloo takes the interface of the host's own name, which on many machines is the loopback.
    """
    if "MASTER_ADDR" in environment and "GLOO_SOCKET_IFNAME" not in environment:
        interface = interface_towards(environment["MASTER_ADDR"])
        environment.update({"GLOO_SOCKET_IFNAME": interface} if interface else {})


def interface_towards(address: str) -> str | None:
    """The network interface through which this host reaches `address`; None when that cannot be told (not Linux)."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it only asks the routing table
            own = probe.getsockname()[0]
    except OSError:
        return None
    if not sys.platform.startswith("linux"):
        return None
    for _, name in socket.if_nameindex():
        if _address_of(name) == own:
            return name
    return None


def _address_of(interface: str) -> str | None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request: Any = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:  # an interface without an IPv4 address
            return None


def _require(environment: Mapping[str, str]) -> None:
    missing = [name for name in _NEEDED if name not in environment]
    if missing:
        raise LaunchError(f"a launcher must set {', '.join(missing)}")
