"""A server that speaks OpenAI's API: a vendor's, or your own vLLM, SGLang or llama.cpp."""

from __future__ import annotations

import ipaddress
import os
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from kdscale.config.fields import Section
from kdscale.errors import ConfigError
from kdscale_launch.environment import without_credentials


class EndpointConfig(Section):
    """Where the server answers, which of its models is asked, and which variable holds the key."""

    base_url: str = ""  # https://HOST/v1
    model: str = ""  # as the server names it
    # the environment variable that holds the API key, which is never written anywhere; null: the server wants none
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)] | None = None
    allow_http: bool = False  # also to other machines, where texts and key can be read on the way
    timeout: Annotated[float, Field(gt=0.0, le=86_400.0)] = 600.0  # seconds for an answer

    @model_validator(mode="after")
    def _url_is_safe(self) -> EndpointConfig:
        if not self.base_url:
            return self
        shown = without_credentials(self.base_url)
        try:
            url = urlsplit(self.base_url)
            host, _ = url.hostname, url.port
        except ValueError as error:
            raise ValueError(f"base_url: expected https://HOST/v1, got {shown} ({error})") from error
        if url.scheme not in ("http", "https") or not host or url.query or url.fragment:
            raise ValueError(f"base_url: expected https://HOST/v1, got {shown}")
        if url.scheme == "http" and not (self.allow_http or is_loopback(host)):
            raise ValueError(
                f"base_url: expected https for another machine, got {shown}; inside a network that you trust, set "
                "allow_http: true"
            )
        return self

    @property
    def on_this_machine(self) -> bool:
        """Whether the server is reached without a network."""
        return is_loopback(urlsplit(self.base_url).hostname or "")

    def missing(self) -> list[str]:
        """The fields without which there is nobody to ask."""
        return [name for name in ("base_url", "model") if not getattr(self, name)]

    def key(self, section: str) -> str | None:
        """The API key. Raises ConfigError, which names `section` and never shows the key, when there is none."""
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not fits_header(key):
            raise ConfigError(
                f"{section}.key_variable",
                expected=f"a key of visible ASCII characters in the environment variable {self.key_variable}",
                got="blanks or control characters in it" if key else "none",
                hint=f"export {self.key_variable}=...",
            )
        return key


def fits_header(key: str) -> bool:
    """Whether a key or token can be sent: some visible ASCII characters and nothing else."""
    return bool(key) and all("!" <= character <= "~" for character in key)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
