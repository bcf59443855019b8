"""Finds what is worth a notice among the new events, and delivers it: one thread of the service."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from sqlalchemy import Connection, func, select

from kdscale.errors import ConfigError
from kdscale.service.database.connection import Database, alone
from kdscale.service.database.events import Event, append_event
from kdscale.service.database.runs import Run, run_in
from kdscale.service.database.schema import EVENTS
from kdscale.service.database.subscriptions import subscriptions_of
from kdscale.service.notices import mail, webhook
from kdscale.service.notices.occasions import DEFAULT_KINDS, Notice, notice_of, text_of
from kdscale.service.notices.outbox import LEASE_SECONDS, Letter, Outbox, cursor, set_cursor
from kdscale.service.notices.recipients import Recipient, parse_recipient
from kdscale.service.notices.webhook import DeliveryError
from kdscale.service.settings import ServiceSettings

EVERYBODY = "*"  # as an owner in notices.owners: of everybody's runs
_EVENTS_AT_ONCE = 500
_SECONDS_BETWEEN = 2.0
_AFTER_ANOTHER = 60.0  # seconds that further notices wait for a recipient whose notice just failed
_log = logging.getLogger("kdscale.service.notices")

Deliver = Callable[[Letter, float], None]


class Notices:
    """Notices of one service. `deliver` sends one letter and raises DeliveryError; by default over the network."""

    def __init__(
        self,
        settings: ServiceSettings,
        database: Database,
        *,
        clock: Callable[[], float] = time.time,
        deliver: Deliver | None = None,
    ):
        """Raises ConfigError for settings that cannot work. Of what happened before the first start nothing is told."""
        self._settings, self._database, self._clock = settings, database, clock
        self.outbox = Outbox(database)
        self._by_owner = check_settings(settings)
        self._deliver = deliver or Delivery(settings)
        with database.begin() as connection:
            alone(connection, "append")  # two services that start at once would both write the first one
            if cursor(connection, database.is_sqlite) is None:
                set_cursor(
                    connection, connection.execute(select(func.coalesce(func.max(EVENTS.c.seq), 0))).scalar_one()
                )

    def run_forever(self, stop: threading.Event) -> None:
        """Find and deliver until `stop` is set. What goes wrong is logged, and tried again."""
        pause = _SECONDS_BETWEEN
        while not stop.wait(pause):
            pause = _SECONDS_BETWEEN
            try:
                self.step()
            except Exception:  # noqa: BLE001 (a full disk or a lost database ends; this thread must not)
                _log.exception("notices could not be written or sent; they are tried again in a minute")
                pause = _AFTER_ANOTHER

    def step(self) -> int:
        """Write what is new and try what is due; returns how many notices were delivered."""
        self.gather()
        return self.send_due()

    def gather(self) -> int:
        """Write the notices that new events are worth; returns how many. Each event is looked at once."""
        added = 0
        while True:
            with self._database.begin() as connection:
                last = cursor(connection, self._database.is_sqlite) or 0
                query = select(EVENTS).where(EVENTS.c.seq > last).order_by(EVENTS.c.seq).limit(_EVENTS_AT_ONCE)
                events = [Event(**row._mapping) for row in connection.execute(query)]
                if not events:
                    return added
                for event in events:
                    added += self._note(connection, event)
                set_cursor(connection, events[-1].seq)

    def _note(self, connection: Connection, event: Event) -> int:
        run = run_in(connection, event.run_id)
        notice = None if run is None else notice_of(event, run, self._clock())
        return 0 if notice is None else self.add(connection, notice)

    def add(self, connection: Connection, notice: Notice) -> int:
        """Write a notice for everybody who wants it, in the caller's transaction; returns for how many."""
        recipients = self.recipients(connection, notice)
        return self.outbox.add(connection, notice, recipients, self._settings.notices.service_url)

    def recipients(self, connection: Connection, notice: Notice) -> list[Recipient]:
        """Who is told: the owner's addresses and everybody's in the settings, and who subscribed to the run."""
        found = self.owners_addresses(notice.run) if notice.kind in DEFAULT_KINDS else []
        for wanted in subscriptions_of(connection, notice.run.id):
            if notice.kind in wanted.on:
                with suppress(ConfigError):  # the settings allow it no more
                    found.append(parse_recipient(wanted.to, self._settings.notices))
        return list(dict.fromkeys(found))

    def owners_addresses(self, run: Run) -> list[Recipient]:
        """Where the settings tell of the runs of this one's owner."""
        return [*self._by_owner.get(run.owner, ()), *self._by_owner.get(EVERYBODY, ())]

    def send_due(self) -> int:
        """Try what is due, at most one failure for each receiving host; returns how many notices arrived."""
        arrived, failing, taken = 0, set(), self._clock()
        for letter in self.outbox.take(taken):
            host = _host(letter.recipient)
            late = self._clock() > taken + LEASE_SECONDS / 2  # its lease may end before the try does
            if late or host in failing:
                self.outbox.put_off(letter, _AFTER_ANOTHER)
                continue
            try:
                self._deliver(letter, self._clock())
            except DeliveryError as error:
                failing.add(host)
                self._failed(letter, error)
            else:
                self.outbox.sent(letter, self._clock())
                arrived += 1
                _log.info("notice %s (%s of run %s) was sent to %s", letter.id, letter.kind, letter.run_id,
                          letter.recipient.shown)  # fmt: skip
        return arrived

    def _failed(self, letter: Letter, error: DeliveryError) -> None:
        now = self._clock()
        given_up = self.outbox.failed(letter, now, str(error), error.final)
        what = "was given up" if given_up else "is tried again later"
        _log.warning("notice %s to %s %s: %s", letter.id, letter.recipient.shown, what, error)
        if given_up:
            facts = {"kind": letter.kind, "to": letter.recipient.shown, "reason": str(error)}
            with self._database.begin() as connection:
                append_event(connection, letter.run_id, now, "notice_failed", facts)


def check_settings(settings: ServiceSettings) -> dict[str, list[Recipient]]:
    """The addresses of owners, parsed. Raises ConfigError for settings with which notices cannot be sent."""
    mail.check_settings(settings.notices)
    if settings.notices.webhook_secret_file is not None:
        webhook.secret_of(settings.folder, settings.notices.webhook_secret_file)
    try:
        return {
            owner: [parse_recipient(text, settings.notices, trusted=True) for text in addresses]
            for owner, addresses in settings.notices.owners.items()
        }
    except ConfigError as error:
        parts = {name: text for name, text in error.parts.items() if name != "what"}
        raise ConfigError("notices.owners", **parts) from error


class Delivery:
    """Sends letters over the network."""

    def __init__(self, settings: ServiceSettings):
        self._settings = settings
        self._secret: bytes | None = None

    def __call__(self, letter: Letter, now: float) -> None:
        """Send one. Raises DeliveryError."""
        notices = self._settings.notices
        try:
            # the settings may have changed since it was written
            parse_recipient(("mailto:" if letter.recipient.channel == "email" else "") + letter.recipient.address,
                            notices, trusted=True)  # fmt: skip
            if letter.recipient.channel == "email":
                text = text_of(letter.kind, letter.body)
                mail.send(
                    notices, mail.message(notices, letter.recipient.address, letter.subject, text, letter.id, now)
                )
                return
            secret = self._key()
        except ConfigError as error:
            raise DeliveryError(str(error)) from error
        body = json.dumps(letter.body, allow_nan=False).encode()
        webhook.post(
            letter.recipient.address,
            body,
            {
                "webhook-id": letter.id,
                "webhook-timestamp": str(int(now)),
                "webhook-signature": webhook.sign(secret, letter.id, int(now), body),
            },
            allowed=notices.webhook_hosts,
        )

    def _key(self) -> bytes:
        if self._secret is None:
            self._secret = webhook.secret_of(self._settings.folder, self._settings.notices.webhook_secret_file)
        return self._secret


def _host(recipient: Recipient) -> str:
    if recipient.channel == "email":
        return "e-mail"  # one server takes them all
    return urlsplit(recipient.address).hostname or ""
