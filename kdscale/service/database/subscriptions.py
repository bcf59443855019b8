"""Who wants to hear of a run besides its owner's addresses in the settings.

Addresses of webhooks are secrets of their owners, so they are kept beside the jobs, where nobody reads over the API,
and not in the run folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from kdscale.files import read_own_json, write_private
from kdscale.service.database.schema import SUBSCRIPTIONS
from kdscale.service.settings import ServiceSettings

FILE = "notify.json"
MOST = 10  # of a run


@dataclass(frozen=True)
class Subscription:
    """An address, and the kinds of notices that it gets."""

    to: str
    on: tuple[str, ...]


def subscribe(connection: Connection, run_id: str, wanted: Sequence[Subscription]) -> None:
    """Keep who wants to hear of a run, in the place of who did before."""
    connection.execute(delete(SUBSCRIPTIONS).where(SUBSCRIPTIONS.c.run_id == run_id))
    rows = [
        {"run_id": run_id, "place": place, "address": item.to, "kinds": list(item.on)}
        for place, item in enumerate({item.to: item for item in wanted}.values())
    ]
    if rows:
        connection.execute(insert(SUBSCRIPTIONS), rows)


def subscriptions_of(connection: Connection, run_id: str) -> list[Subscription]:
    """Who wants to hear of a run."""
    rows = connection.execute(
        select(SUBSCRIPTIONS).where(SUBSCRIPTIONS.c.run_id == run_id).order_by(SUBSCRIPTIONS.c.place)
    )
    return [Subscription(row.address, tuple(row.kinds)) for row in rows]


def subscriptions_file(settings: ServiceSettings, run_id: str) -> Path:
    """Where they are kept for a database that is made anew."""
    return settings.jobs / run_id / FILE


def write_subscriptions(settings: ServiceSettings, run_id: str, wanted: Sequence[Subscription]) -> None:
    """Keep them beside the run's jobs, for the owner of the files alone."""
    path = subscriptions_file(settings, run_id)
    if wanted or path.exists():
        write_private(path, json.dumps([asdict(item) for item in wanted]).encode())


def read_subscriptions(settings: ServiceSettings, run_id: str) -> list[Subscription]:
    """Those that were kept; none where there is no sound file."""
    kept = read_own_json(subscriptions_file(settings, run_id), _are_subscriptions) or []
    return [Subscription(item["to"], tuple(item["on"])) for item in kept]


def _are_subscriptions(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and isinstance(item.get("to"), str)
        and isinstance(item.get("on"), list)
        and all(isinstance(kind, str) for kind in item["on"])
        for item in value[:MOST]
    )
