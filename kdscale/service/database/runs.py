"""Runs in the database: added, listed, claimed for slots, and moved from state to state.

Every change is one statement that names the state which it expects, so that of two that race one changes nothing and is
told so; its event is written in the same transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, case, func, insert, or_, select, update

from kdscale.service.database.connection import Database, alone
from kdscale.service.database.events import append_event
from kdscale.service.database.schema import RUNS
from kdscale.service.ids import new_run_id
from kdscale.service.states import (
    ACTIVE,
    ANSWERS,
    FINAL,
    NEXT,
    Request,
    RunState,
    UnknownRunError,
    WrongTransitionError,
)

LONGEST_REASON = 4000
MOST_A_PAGE = 500


@dataclass(frozen=True)
class Run:
    """A run as the database has it; times are seconds since 1970."""

    id: str
    name: str
    owner: str
    state: RunState
    reason: str
    priority: int
    created: float
    updated: float
    queued: float | None
    started: float | None
    ended: float | None
    due: float | None
    attempt: int
    tries: int
    config: dict[str, Any]
    config_name: str
    overrides: list[str]
    target: dict[str, Any]
    folder: Path
    slots: int
    devices: list[str]
    handle: str | None
    exit_code: int | None
    parent: str | None
    origin: str
    progress: dict[str, Any]


@dataclass(frozen=True)
class NewRun:
    """What a run begins with. `id` and `created` are given when the database is rebuilt."""

    name: str
    owner: str
    config: dict[str, Any]
    folder: Path
    config_name: str = ""
    overrides: list[str] = field(default_factory=list)
    target: dict[str, Any] = field(default_factory=lambda: {"engine": "local"})
    priority: int = 0
    slots: int = 1
    parent: str | None = None
    origin: str = "service"
    state: RunState = "queued"
    reason: str = ""
    attempt: int = 0
    exit_code: int | None = None
    id: str = field(default_factory=new_run_id)
    created: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Page:
    """Some of a list, and from where the next ones are asked for; None at the end."""

    items: list[Run]
    next: str | None


@dataclass(frozen=True)
class ClaimLimits:
    """What claims are bound by: slots that are free, runs at once, and slots of an owner at once (None: any number).

    Only runs for `engine` are claimed: those that wait for another one's slots are in nobody's way. Nor are those that
    need more than all of its slots (`most_slots`; None: any number). `below`: only runs with folders in this one.
    """

    free_slots: int
    max_running: int | None = None
    default_quota: int | None = None
    quotas: Mapping[str, int] = field(default_factory=dict)
    engine: str = "local"
    most_slots: int | None = None
    below: Path | None = None


# The engine that a run asks for.
_ENGINE = func.coalesce(RUNS.c.target["engine"].as_string(), "local")


class Runs:
    """The runs of a database. `clock` gives seconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self._database, self._clock = database, clock

    def add(self, new: NewRun) -> Run:
        """Add a run. Adding one that is there already (same id) changes nothing and returns that."""
        with self._database.begin() as connection:
            return self.add_in(connection, new)

    def add_in(self, connection: Connection, new: NewRun) -> Run:
        """`add` inside a transaction of the caller's."""
        there = connection.execute(select(RUNS).where(RUNS.c.id == new.id)).first()
        if there is not None:
            return _run(there)
        now = self._clock()
        values = {
            **vars(replace(new, reason=new.reason[:LONGEST_REASON])), "folder": str(new.folder), "updated": now,
            "queued": now if new.state == "queued" else None, "ended": now if new.state in FINAL else None,
            "devices": [], "progress": {}, "tries": 0,
        }  # fmt: skip
        row = connection.execute(insert(RUNS).values(values).returning(RUNS)).one()
        append_event(connection, new.id, now, "state", {"state": new.state, "reason": new.reason, "name": new.name})
        return _run(row)

    def get(self, run_id: str) -> Run:
        """The run of this id. Raises UnknownRunError."""
        if (run := self.find(run_id)) is None:
            raise _unknown(run_id)
        return run

    def find(self, run_id: str) -> Run | None:
        """The run of this id, if there is one."""
        with self._database.read() as connection:
            return run_in(connection, run_id)

    def at_folder(self, folder: Path) -> Run | None:
        """The run in a folder, if the database knows it."""
        with self._database.read() as connection:
            row = connection.execute(select(RUNS).where(RUNS.c.folder == str(folder))).first()
        return None if row is None else _run(row)

    def page(
        self,
        *,
        states: Collection[RunState] = (),
        owner: str | None = None,
        search: str = "",
        after: str | None = None,
        limit: int = 50,
    ) -> Page:
        """Runs without their configs, the newest first, behind the run `after`; `search`: part of a name or an id."""
        conditions: list[ColumnElement[bool]] = []
        if states:
            conditions.append(RUNS.c.state.in_(sorted(states)))
        if owner is not None:
            conditions.append(RUNS.c.owner == owner)
        if search:
            conditions.append(or_(*(column.icontains(search, autoescape=True) for column in (RUNS.c.name, RUNS.c.id))))
        if after is not None:
            conditions.append(RUNS.c.id < after)
        limit = max(1, min(limit, MOST_A_PAGE))
        listed = [column for column in RUNS.c if column is not RUNS.c.config]  # reading fifty of them takes a while
        query = select(*listed).where(*conditions).order_by(RUNS.c.id.desc()).limit(limit + 1)
        with self._database.read() as connection:
            found = [_run(row, config={}) for row in connection.execute(query)]
        return Page(found[:limit], found[limit - 1].id if len(found) > limit else None)

    def in_states(self, states: Collection[RunState], origin: str | None = "service") -> list[Run]:
        """All runs in these states, the oldest first; `origin` None: of any origin."""
        query = select(RUNS).where(RUNS.c.state.in_(sorted(states))).order_by(RUNS.c.id)
        if origin is not None:
            query = query.where(RUNS.c.origin == origin)
        with self._database.read() as connection:
            return [_run(row) for row in connection.execute(query)]

    def queue(self, limit: int = 50) -> list[Run]:
        """The runs that wait, those of a higher priority first; owners take turns when they are claimed."""
        waiting = select(RUNS).where(RUNS.c.state == "queued", RUNS.c.origin == "service")
        query = waiting.order_by(RUNS.c.priority.desc(), RUNS.c.queued, RUNS.c.id).limit(limit)
        with self._database.read() as connection:
            return [_run(row) for row in connection.execute(query)]

    def counts(self) -> dict[str, int]:
        """How many runs there are in each state that has any."""
        with self._database.read() as connection:
            rows = connection.execute(select(RUNS.c.state, func.count()).group_by(RUNS.c.state))
            return {row[0]: row[1] for row in rows}

    def owners(self) -> list[str]:
        """Everybody who has a run."""
        with self._database.read() as connection:
            return list(connection.execute(select(RUNS.c.owner).distinct().order_by(RUNS.c.owner)).scalars())

    def move(
        self, run_id: str, to: RunState, *, expect: Collection[RunState] | None = None, reason: str = "", **fields: Any
    ) -> Run:
        """Bring a run into another state; `fields` are other columns that change with it.

        `expect`: only from one of these states, by default any that `to` may follow. Raises WrongTransitionError when
        it is in another one by now, and UnknownRunError.
        """
        with self._database.begin() as connection:
            return self._move(connection, run_id, to, expect, reason, fields)

    def _move(
        self, connection: Connection, run_id: str, to: RunState, expect: Collection[RunState] | None, reason: str,
        fields: Mapping[str, Any],
    ) -> Run:  # fmt: skip
        may_come_from = {state for state, following in NEXT.items() if to in following}
        sources = may_come_from if expect is None else may_come_from & set(expect)
        now, reason = self._clock(), reason[:LONGEST_REASON]
        values: dict[str, Any] = {"state": to, "reason": reason, "updated": now, "due": None, **fields}
        if to == "queued":
            values = {"queued": now, "ended": None, "handle": None, "devices": [], **values}
        elif to == "paused":
            values = {"devices": [], **values}
        elif to in FINAL:
            values = {"ended": now, "devices": [], **values}
        statement = update(RUNS).where(RUNS.c.id == run_id, RUNS.c.state.in_(sorted(sources)))
        row = connection.execute(statement.values(values).returning(RUNS)).first()
        if row is None:
            state = connection.execute(select(RUNS.c.state).where(RUNS.c.id == run_id)).scalar()
            if state is None:
                raise _unknown(run_id)
            raise WrongTransitionError(
                f"run {run_id}", expected=f"one that is {' or '.join(sorted(sources)) or 'in another state'}",
                got=f"it is {state}",
            )  # fmt: skip
        data = {"state": to, "reason": reason, "attempt": row.attempt}
        data |= {name: fields[name] for name in ("exit_code",) if name in fields}
        append_event(connection, run_id, now, "state", data)
        return _run(row)

    def ask(self, run_id: str, request: Request, reason: str = "", **fields: Any) -> Run:
        """Do what somebody asks of a run; asking twice is answered like asking once.

        Raises WrongTransitionError where it does not fit the run's state, and UnknownRunError.
        """
        answers = ANSWERS[request]
        with self._database.begin() as connection:
            # locked, or it could have moved on before this request moves it (SQLite's transaction is alone anyway)
            row = connection.execute(select(RUNS).where(RUNS.c.id == run_id).with_for_update()).first()
            if row is None:
                raise _unknown(run_id)
            run = _run(row)
            if run.origin != "service":
                raise WrongTransitionError(
                    f"run {run_id}", expected="a run that this service started", got=f"one of the {run.origin}"
                )
            if run.state in _already(request):
                return run
            to = answers.get(run.state)
            if to is None:
                raise WrongTransitionError(
                    f"{request} of run {run_id}", expected=f"one that is {', '.join(answers)}", got=f"it is {run.state}"
                )
            if request == "resume":
                fields = {"tries": 0, **fields}
            return self._move(connection, run_id, to, (run.state,), reason, fields)

    def update(self, run_id: str, *, expect: Collection[RunState] | None = None, **fields: Any) -> Run | None:
        """Change columns other than the state; None, and nothing changed, when it is in no state of `expect`."""
        statement = update(RUNS).where(RUNS.c.id == run_id)
        if expect is not None:
            statement = statement.where(RUNS.c.state.in_(sorted(expect)))
        with self._database.begin() as connection:
            row = connection.execute(statement.values(updated=self._clock(), **fields).returning(RUNS)).first()
        return None if row is None else _run(row)

    def set_progress(self, run_id: str, progress: Mapping[str, Any]) -> None:
        """Keep what a run folder says of its progress; no event, as there is one every second."""
        with self._database.begin() as connection:
            connection.execute(update(RUNS).where(RUNS.c.id == run_id).values(progress=dict(progress)))

    def queued_for(self) -> list[str]:
        """The engines that runs in the queue ask for."""
        query = select(_ENGINE).where(RUNS.c.state == "queued", RUNS.c.origin == "service").distinct()
        with self._database.read() as connection:
            return sorted(connection.execute(query).scalars())

    def claim(self, limits: ClaimLimits) -> Run | None:
        """Take the next run out of the queue into `starting`, with one attempt more; None when none fits.

        Higher priority first, then the owner who holds the fewest slots, then who waited longest. A run that does not
        fit into the free slots lets none behind it pass, or large runs would wait for ever.
        """
        with self._database.begin() as connection:
            alone(connection, "claim")  # two that count at once would both take the last of a quota
            rows = connection.execute(
                select(RUNS.c.owner, func.sum(RUNS.c.slots))
                .where(RUNS.c.state.in_(sorted(ACTIVE)), RUNS.c.origin == "service")
                .group_by(RUNS.c.owner)
            )
            held: dict[str, int] = {row[0]: row[1] for row in rows}
            running = connection.execute(
                select(func.count()).where(RUNS.c.state.in_(sorted(ACTIVE)), RUNS.c.origin == "service")
            ).scalar_one()
            if limits.max_running is not None and running >= limits.max_running:
                return None
            chosen = connection.execute(self._next_in_queue(held, limits)).first()
            if chosen is None or chosen.slots > limits.free_slots:
                return None
            row = connection.execute(
                update(RUNS)
                .where(RUNS.c.id == chosen.id, RUNS.c.state == "queued")
                .values(
                    state="starting", reason="", updated=self._clock(), due=None, exit_code=None, handle=None,
                    attempt=RUNS.c.attempt + 1, tries=RUNS.c.tries + 1,
                )
                .returning(RUNS)
            ).first()  # fmt: skip
            if row is None:
                return None
            append_event(
                connection, row.id, row.updated, "state", {"state": "starting", "reason": "", "attempt": row.attempt}
            )
            return _run(row)

    def _next_in_queue(self, held: Mapping[str, int], limits: ClaimLimits) -> Any:
        waiting = and_(
            RUNS.c.state == "queued", RUNS.c.origin == "service", _ENGINE.in_((limits.engine,)),
            or_(RUNS.c.due.is_(None), RUNS.c.due <= self._clock()),
        )  # fmt: skip
        if limits.most_slots is not None:
            waiting = and_(waiting, RUNS.c.slots <= limits.most_slots)
        if limits.below is not None:
            waiting = and_(waiting, RUNS.c.folder.startswith(f"{limits.below}/", autoescape=True))
        holds = case(held, value=RUNS.c.owner, else_=0) if held else 0
        within = []
        if limits.quotas or limits.default_quota is not None:
            most = 2**31 - 1
            default = most if limits.default_quota is None else limits.default_quota
            quota = case(dict(limits.quotas), value=RUNS.c.owner, else_=default) if limits.quotas else default
            within = [RUNS.c.slots + holds <= quota]
        order = (RUNS.c.priority.desc(), *((holds,) if held else ()), RUNS.c.queued, RUNS.c.id)
        query = select(RUNS.c.id, RUNS.c.slots).where(waiting, *within).order_by(*order).limit(1)
        return query if self._database.is_sqlite else query.with_for_update(skip_locked=True)

    def remove(self, run_id: str) -> None:
        """Forget an ended run; its folder is the caller's matter. Raises WrongTransitionError for one that goes on."""
        with self._database.begin() as connection:
            gone = connection.execute(
                RUNS.delete().where(RUNS.c.id == run_id, RUNS.c.state.in_(sorted(FINAL))).returning(RUNS.c.id)
            ).first()
        if gone is None:
            self.get(run_id)
            raise WrongTransitionError(f"run {run_id}", expected="one that has ended", hint="cancel it first")


def run_in(connection: Connection, run_id: str) -> Run | None:
    """The run of this id, read in the caller's transaction; None where there is none."""
    row = connection.execute(select(RUNS).where(RUNS.c.id == run_id)).first()
    return None if row is None else _run(row)


def _already(request: Request) -> frozenset[RunState]:
    states: dict[Request, frozenset[RunState]] = {
        "pause": frozenset({"pausing", "paused"}),
        "resume": ACTIVE - {"pausing", "cancelling"} | {"queued"},
        "cancel": frozenset({"cancelling", "cancelled"}),
    }
    return states[request]


def _unknown(run_id: str) -> UnknownRunError:
    return UnknownRunError(f"there is no run {run_id[:60]!r}")


def _run(row: Row[Any], **more: Any) -> Run:
    return Run(**{**row._mapping, **more, "folder": Path(row.folder)})
