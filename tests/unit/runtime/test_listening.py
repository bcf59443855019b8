"""Where the teacher service listens."""

from __future__ import annotations

import pytest

from kdscale.errors import ConfigError
from kdscale.runtime.listening import listen


@pytest.mark.parametrize("host", ["", "é" * 300, "\udc80", "x" * 300, "a b", "a\nb", "::" * 200, "a..b"])
def test_an_address_that_cannot_be_is_refused(host: str) -> None:
    """Also no address at all, which the system would take for every interface."""
    with pytest.raises(ConfigError, match="--host and --port"):
        listen(host, 0)


def test_a_port_that_is_taken_is_refused() -> None:
    first = listen("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="already in use"):
        listen("127.0.0.1", first.getsockname()[1])
    first.close()
