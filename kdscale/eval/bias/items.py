"""One item of a measure: what a model is asked, and what is known about it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_CLUSTERS = 20  # that a limit has to have room for
Row = Mapping[str, float]  # the columns of one item: NaN, or left out, where the item says nothing about one


@dataclass(frozen=True)
class Item:
    """A text, question or prompt.

    `choices`: (context, text) pairs whose log-likelihoods are compared, of measures that score given texts; `messages`:
    a prompt, of measures whose texts the models write. Items with one `cluster` are variants of each other: standard
    errors are over clusters.
    """

    where: str  # for messages to people, and the file of items
    group: str
    choices: tuple[tuple[str, str], ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    cluster: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Likelihood:
    """Of one choice: its log-likelihood in nats, given its context, and the tokens that it has."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token: choices of different lengths can be compared."""
        return self.total / max(self.tokens, 1)


def cluster_of(item: Item) -> str:
    """What the item is a variant of; itself where it stands alone."""
    return item.cluster or item.where


def drawn(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` items in their order, drawn by the seed: whole clusters, unless those are large."""
    if limit is None or len(items) <= limit:
        return list(items)
    sizes = Counter(map(cluster_of, items))
    whole = max(sizes.values()) <= limit // _CLUSTERS
    unit_of = cluster_of if whole else (lambda item: item.where)
    count = sizes if whole else Counter(map(unit_of, items))
    order = sorted(count)
    random.Random(seed).shuffle(order)
    kept: set[str] = set()
    room = limit
    for unit in order:
        if count[unit] <= room:
            kept.add(unit)
            room -= count[unit]
    return [item for item in items if unit_of(item) in kept]
