"""Settings of a service: serve.yaml in its home folder, and the options of `kdscale serve`, which come first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from kdscale.config.endpoint import is_loopback
from kdscale.config.fields import Count, Few, Name, Seconds, Section, explain_errors
from kdscale.config.load import parse_yaml
from kdscale.errors import ConfigError
from kdscale.files import read_text

SETTINGS_FILE = "serve.yaml"
_MAX_BYTES = 1 << 20
_DAY = 86_400.0
Days = Annotated[float, Field(ge=0.0, le=36_500.0)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]


class LimitSettings(Section):
    """What one client, or all together, may use at once."""

    body_bytes: Count = 1 << 20
    header_bytes: Count = 32 << 10
    requests_per_minute: Few = 600  # of one token, or one address without
    failed_sign_ins_per_minute: Few = 10
    concurrent_requests: Few = 200
    event_streams: Few = 500
    body_seconds: Seconds = 20.0  # in which a body must have come
    check_seconds: Seconds = 120.0  # that the check of one config may take


class RetentionSettings(Section):
    """After how many days something of an ended run is deleted; None keeps it. Deleted means moved to the trash first.

    A student is never deleted unless `students_after` says so, and its owner is told `notice_days` before.
    """

    checkpoints_after: Days | None = None
    logs_after: Days | None = None
    students_after: Days | None = None
    notice_days: Days = 7.0
    trash_after: Days = 7.0


class NoticeSettings(Section):
    """Where notices may go: hosts of webhooks, and the server that sends e-mail."""

    webhook_hosts: tuple[str, ...] = ()  # besides public addresses, which are always allowed
    webhook_secret_file: str | None = None  # signs every notice; made in the home folder when left out
    smtp_host: str | None = None
    smtp_port: Annotated[int, Field(ge=1, le=65_535)] = 587
    smtp_security: Literal["starttls", "tls", "none"] = "starttls"
    smtp_user: str | None = None
    smtp_password_file: str | None = None
    smtp_password_variable: VariableName | None = None  # of the environment, in the place of a file
    sender: str | None = None
    mail_domains: tuple[str, ...] = ()  # of the mailboxes that a run may name; those of `owners` may have any
    service_url: str | None = None  # how people reach this service, for the link in a notice
    # Webhook addresses and mailto: addresses by owner; those of "*" hear of everybody's runs.
    owners: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _link_is_an_address(self) -> Self:
        if self.service_url is not None and not re.fullmatch(r"https?://[^\s?#@]+", self.service_url):
            raise ValueError("service_url: expected http(s)://HOST, without a user, a query or a #fragment")
        return self


class OidcSettings(Section):
    """A provider of identities that people sign in with."""

    issuer: str
    client_id: str
    client_secret_file: str
    owner_claim: str = "preferred_username"
    scope_claim: str = "groups"
    scopes: dict[str, Literal["read", "run", "admin"]] = Field(default_factory=dict)  # by a value of the claim
    default_scope: Literal["read", "run", "admin"] | None = None  # None: whoever has no such value is refused


class ServiceSettings(Section):
    """Everything that a service can be told; `home` is where it keeps everything.

    `database`: an SQLAlchemy URL, or None for SQLite in the home folder. `slots`: devices that runs share, or None for
    what this machine has. `roots`: folders that a config may name besides the run's own.
    """

    home: str
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8765  # 0: any free one
    database: str | None = None
    database_password_file: str | None = None  # so that the address above needs none
    roots: tuple[str, ...] = ()
    endpoint_hosts: tuple[str, ...] = ()  # that a config may name in addresses of endpoints, as HOST or HOST:PORT
    # by host: the variables of the service whose keys a config may send there
    endpoint_keys: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    slots: Few | None = None
    max_running: Few | None = None
    quotas: dict[Name, Few] = Field(default_factory=dict)  # slots of one owner at once
    default_quota: Few | None = None
    tries: Few = 3  # starts of a run whose end was worth another try
    retry_seconds: Seconds = 30.0  # before the second start; twice as long before each further one
    grace: Seconds = 120.0  # in which a run that is told to stop must have saved
    hung_after: Seconds = 3600.0  # without any progress
    poll_seconds: Annotated[float, Field(gt=0.0, le=60.0)] = 1.0
    limits: LimitSettings = LimitSettings()
    retention: RetentionSettings = RetentionSettings()
    notices: NoticeSettings = NoticeSettings()
    oidc: OidcSettings | None = None
    engines: dict[Name, dict[str, Any]] = Field(default_factory=dict)  # what a run's target leaves out, by engine
    allowed_hosts: tuple[str, ...] = ()  # names that this service is called by, besides its own address
    tls_certificate: str | None = None
    tls_key: str | None = None
    insecure_http: bool = False  # other machines may connect without TLS
    trusted_proxies: tuple[str, ...] = ()  # addresses whose X-Forwarded-* headers count
    public_metrics: bool = False  # /metrics without a token
    mcp: bool = True
    mcp_write: bool = False
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _connections_are_private(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_key: expected a certificate and its key, or neither")
        if not (self.is_loopback or self.tls_certificate or self.insecure_http):
            raise ValueError(
                f"host: {self.host} is open to other machines: expected tls_certificate and tls_key, or insecure_http"
                " where a proxy in front speaks TLS"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def folder(self) -> Path:
        """The home folder, absolute."""
        return Path(self.home).absolute()

    @property
    def runs(self) -> Path:
        """The folder of the run folders that this service makes."""
        return self.folder / "runs"

    def has_made(self, folder: Path) -> bool:
        """Whether a run folder is this service's: others may share its database."""
        return folder.parent == self.runs

    @property
    def jobs(self) -> Path:
        """The folder of what engines keep of every attempt."""
        return self.folder / "jobs"

    @property
    def trash(self) -> Path:
        """The folder of what was deleted and can still be taken back."""
        return self.folder / "trash"

    @property
    def database_url(self) -> str:
        """Where the database is."""
        return self.database or f"sqlite:///{self.folder / 'service.db'}"


def load_settings(home: Path, options: Mapping[str, Any] | None = None) -> ServiceSettings:
    """The settings in `home`, changed by what the command line says. Raises ConfigError that names every wrong one."""
    path = home / SETTINGS_FILE
    tree: Any = {}
    if path.exists():
        tree = parse_yaml(read_text(path, ConfigError, _MAX_BYTES), str(path)) or {}
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} holds no settings", expected="a mapping", got=type(tree).__name__)
    tree |= {name: value for name, value in (options or {}).items() if value is not None}
    try:
        return ServiceSettings.model_validate({**_lists_as_tuples(tree), "home": str(home)})
    except ValidationError as error:
        raise ConfigError("\n".join(explain_errors(error, ServiceSettings))) from error


def _lists_as_tuples(value: Any) -> Any:
    """YAML has lists where the settings have tuples."""
    if isinstance(value, dict):
        return {key: _lists_as_tuples(item) for key, item in value.items()}
    return tuple(map(_lists_as_tuples, value)) if isinstance(value, list) else value
