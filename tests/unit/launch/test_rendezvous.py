"""A rank's place in the environment, the network interface it uses, and how ranks wait for rank 0."""

from __future__ import annotations

import socket
import sys
import threading
import time

import pytest

from kdscale_launch import LaunchError, RankPlace
from kdscale_launch.local import free_port
from kdscale_launch.rendezvous import (
    listen_as_rank_0,
    parse_rank_place,
    release_waiting_ranks,
    set_interfaces,
    take_rank_place,
    wait_for_rank_0,
)  # fmt: skip


def test_a_place_is_taken_out_of_the_environment_and_read_back():
    environment = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
                   "MASTER_PORT": "77", "HOME": "/h"}  # fmt: skip
    place = parse_rank_place(take_rank_place(environment))
    assert environment == {"HOME": "/h"}
    assert (place.first_rank, place.world_size, place.local_world_size) == (0, 4, 2)
    assert (place.master_addr, place.master_port) == ("a", 77)
    with pytest.raises(LaunchError, match="WORLD_SIZE"):
        take_rank_place({"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its interfaces")
@pytest.mark.parametrize(
    ("given", "gloo", "nccl"),
    [
        ({}, "lo", "=lo"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "ib0", "=lo"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, "lo", "^docker"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, None, None),
    ],
)
def test_ranks_are_given_the_interface_that_leads_to_rank_0(tmp_path, given, gloo, nccl):
    environment = {"MASTER_ADDR": "127.0.0.1", "HOME": str(tmp_path), **given}
    set_interfaces(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == gloo
    assert environment.get("NCCL_SOCKET_IFNAME") == nccl


@pytest.mark.parametrize("variable", ["HOME", "NCCL_CONF_FILE"])
def test_an_interface_in_a_file_of_nccl_stays(tmp_path, variable):
    (tmp_path / ".nccl.conf").write_text("NCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME=ib0\n")
    place = tmp_path if variable == "HOME" else tmp_path / ".nccl.conf"
    environment = {"MASTER_ADDR": "127.0.0.1", variable: str(place)}
    set_interfaces(environment)
    assert "NCCL_SOCKET_IFNAME" not in environment
    assert "GLOO_SOCKET_IFNAME" in environment


def door(port: int) -> dict[str, str]:
    return {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_ranks_wait_until_rank_0_listens() -> None:
    port, answers = free_port(), []
    waiting = threading.Thread(target=lambda: answers.append(wait_for_rank_0(door(port))))
    waiting.start()
    with socket.create_server(("127.0.0.1", port)):
        waiting.join(20)
    assert answers == [True]


def test_ranks_are_sent_home_when_there_is_nothing_to_distil() -> None:
    port, answers = free_port(), []
    waiting = [threading.Thread(target=lambda: answers.append(wait_for_rank_0(door(port)))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    release_waiting_ranks(RankPlace(0, 3, "127.0.0.1", port), seconds=20.0)
    for thread in waiting:
        thread.join(20)
    assert answers == [False, False]


@pytest.mark.parametrize("local", ["2", "1"])
def test_rank_0_listens_where_it_was_told_to_and_nowhere_else(local: str) -> None:
    environment = {**door(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": local}
    with listen_as_rank_0(environment) as listener:
        assert listener.getsockname() == ("127.0.0.1", int(environment["MASTER_PORT"]))
        with pytest.raises(LaunchError, match=r"cannot listen on 127\.0\.0\.1"):
            listen_as_rank_0(environment)


@pytest.mark.parametrize("address", ["127.0.1.1", "192.0.2.1"])
def test_an_address_that_the_other_hosts_would_not_reach_is_not_the_only_one(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Debian gives a host's own name the address 127.0.1.1; a cloud translates addresses that hosts do not have."""
    environment = {**door(free_port("")), "WORLD_SIZE": "2", "MASTER_ADDR": "node-1"}
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(environment["MASTER_PORT"])))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolved)
    with listen_as_rank_0(environment) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
    assert "all its addresses" in capsys.readouterr().err
    if address == "127.0.1.1":
        with listen_as_rank_0({**environment, "LOCAL_WORLD_SIZE": "2"}) as listener:
            assert listener.getsockname()[0] == address


def test_rank_0_does_not_wait_for_ranks_that_never_come() -> None:
    began = time.monotonic()
    release_waiting_ranks(RankPlace(0, 3, "127.0.0.1", free_port()), seconds=0.2)
    assert time.monotonic() - began < 10
