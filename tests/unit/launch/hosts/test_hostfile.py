"""Hostfiles: what is read, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale_launch import Host, LaunchError, parse_hostfile
from kdscale_launch.hosts.hostfile import first_ranks


def test_a_hostfile_in_deepspeeds_format():
    text = "# two\n\nworker-1 slots=4  # big\nroot@10.0.0.2   slots=2\n"
    hosts = parse_hostfile(text)
    assert hosts == (Host("worker-1", 4), Host("root@10.0.0.2", 2))
    assert first_ranks(hosts) == [0, 4]
    assert hosts[1].address == "10.0.0.2"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "lists no host"),
        ("worker-1\n", r"line 1: expected `host slots=N`, got 'worker-1'"),
        ("a slots=1\n\na slots=2", "line 3: a is listed twice"),
        ("a slots=0", "line 1: a has no slots"),
        ("-oProxyCommand=x slots=1", "is not a host name"),
        ("a;reboot slots=1", "is not a host name"),
        ("$(x) slots=1", "is not a host name"),
        ("-v@h1 slots=1", "'-v@h1' is not a host name"),
        ("h1\x0b slots=1", "expected `host slots=N`"),
        ("a slots=\u0661", "expected `host slots=N`"),
        ("a slots=" + "9" * 5000, "expected `host slots=N`"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(text, problem):
    with pytest.raises(LaunchError, match=problem.replace("(", r"\(").replace(")", r"\)").replace("$", r"\$")):
        parse_hostfile(text)


@pytest.mark.parametrize("name", ["-v@h1", "-oProxyCommand=x", "h1\n", "h 1", ""])
def test_no_host_has_a_name_that_ssh_takes_for_something_else(name):
    with pytest.raises(LaunchError, match="expected the name or address of a host"):
        Host(name, 1)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_no_hostfile_smuggles_an_option_or_a_shell_word_in(text):
    try:
        hosts = parse_hostfile(text)
    except LaunchError:
        return
    for host in hosts:
        assert not host.name.startswith("-")
        assert not set(host.name) & set(" \t\n;|&$`'\"\\<>(){}*?!#~")
