"""A socket of a service, opened before the service's own work, so that a port that is taken is reported at once."""

from __future__ import annotations

import socket

from kdscale.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; requests that come before anybody answers wait in its queue.

    Raises ConfigError for an address that is not this machine's, and a port that is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if not host:
            raise OSError("no address, which would stand for all interfaces")
        listener.bind((host, port))
        listener.listen()
    except (OSError, TypeError) as error:  # TypeError: a name that cannot be encoded
        listener.close()
        raise ConfigError(
            "--host and --port", expected="an address of this machine and a free port",
            got=f"{host}:{port}: {getattr(error, 'strerror', None) or error}", hint="--port 0 takes a free one",
        ) from error  # fmt: skip
    return listener


def address_of(listener: socket.socket, host: str, scheme: str = "http") -> str:
    """The address to open for a listener at `host`; a name of this machine where it listens on all interfaces."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"
