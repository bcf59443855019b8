"""Runs, events, tokens and kept answers in SQLite; tests/integration/service has the same in Postgres."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from kdscale.service.database.accounts import PREFIX, Accounts
from kdscale.service.database.answers import Answers, KeyReusedError
from kdscale.service.database.connection import Database, open_database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import ClaimLimits, NewRun, Run, Runs
from kdscale.service.database.schema import METADATA
from kdscale.service.ids import is_run_id, new_run_id
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import FINAL, NEXT, STATES, UnknownRunError, WrongTransitionError


@pytest.fixture
def database(tmp_path: Path) -> Any:
    opened = open_database(ServiceSettings(home=str(tmp_path / "home")))
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Callable[[], float]:
    return itertools.count(1000.0).__next__


@pytest.fixture
def runs(database: Database, clock: Callable[[], float]) -> Runs:
    return Runs(database, clock)


def add(runs: Runs, number: int = 0, **fields: Any) -> Run:
    values = {"name": f"run {number}", "owner": "ada", "config": {"a": 1}, "folder": Path(f"/runs/{number}")}
    return runs.add(NewRun(**{**values, "id": new_run_id(number), **fields}))


def test_migrations_make_the_tables_of_the_schema(database: Database) -> None:
    with database.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_ids_are_in_the_order_of_their_making() -> None:
    ids = [new_run_id(seconds) for seconds in (0, 1, 1.5, 1e9, 3e10)]
    assert sorted(ids) == ids and all(map(is_run_id, ids))
    assert not any(map(is_run_id, ("", "../" + ids[0], ids[0] + "\n", ids[0].upper() + "U")))


def test_every_state_is_reached_and_final_ones_begin_again_only_by_request() -> None:
    reached = set().union(*NEXT.values())
    assert set(NEXT) == set(STATES) == reached | {"queued"}
    assert all(NEXT[state] <= {"queued"} for state in FINAL)


def test_a_run_moves_only_where_its_state_allows(runs: Runs) -> None:
    run = add(runs)
    with pytest.raises(WrongTransitionError, match="it is queued"):
        runs.move(run.id, "running")
    runs.move(run.id, "starting")
    with pytest.raises(WrongTransitionError, match="it is starting"):
        runs.move(run.id, "running", expect=("recovering",))
    assert runs.move(run.id, "running", handle="7").handle == "7"
    ended = runs.move(run.id, "succeeded", exit_code=0)
    assert ended.ended is not None and ended.exit_code == 0
    with pytest.raises(UnknownRunError):
        runs.move(new_run_id(), "running")


def test_each_move_is_an_event(runs: Runs, database: Database) -> None:
    run = add(runs)
    runs.move(run.id, "starting")
    events = Events(database)
    found = events.since(0, run.id)
    assert [event.data["state"] for event in found] == ["queued", "starting"]
    assert events.since(found[0].seq) == found[1:] and events.last_seq() == found[-1].seq
    assert events.append(run.id, "note", {}) > found[-1].seq


@pytest.mark.parametrize(
    ("request_", "path", "state"),
    [
        ("pause", (), "paused"),
        ("pause", ("starting", "running"), "pausing"),
        ("cancel", (), "cancelled"),
        ("cancel", ("starting",), "cancelling"),
        ("resume", ("paused",), "queued"),
        ("resume", ("starting", "failed"), "queued"),
    ],
)
def test_what_is_asked_fits_the_state(runs: Runs, request_: Any, path: tuple[Any, ...], state: str) -> None:
    run = add(runs)
    for to in path:
        runs.move(run.id, to)
    assert runs.ask(run.id, request_).state == state
    assert runs.ask(run.id, request_).state == state, "asking twice is asking once"


def test_what_does_not_fit_is_refused(runs: Runs) -> None:
    run = add(runs)
    runs.move(run.id, "starting")
    runs.move(run.id, "succeeded")
    for request in ("pause", "resume", "cancel"):
        with pytest.raises(WrongTransitionError, match="it is succeeded"):
            runs.ask(run.id, request)
    with pytest.raises(WrongTransitionError, match="command line"):
        runs.ask(add(runs, 1, origin="command line", state="running").id, "cancel")


def test_claims_go_by_priority_then_fairness_then_age(runs: Runs) -> None:
    for number, (owner, priority) in enumerate([("ada", 0), ("ada", 0), ("bob", 0), ("eve", 5), ("ada", 0)]):
        add(runs, number, owner=owner, priority=priority)
    claimed = [runs.claim(ClaimLimits(free_slots=1)) for _ in range(6)]
    assert [run and run.name for run in claimed] == ["run 3", "run 0", "run 2", "run 1", "run 4", None]
    assert claimed[0] is not None and claimed[0].attempt == claimed[0].tries == 1


def test_what_comes_back_into_the_queue_waits_behind_what_is_there(runs: Runs) -> None:
    first, second = add(runs, 0), add(runs, 1)
    runs.ask(first.id, "pause")
    runs.ask(first.id, "resume")
    claimed = [runs.claim(ClaimLimits(free_slots=1)) for _ in range(2)]
    assert [run and run.id for run in claimed] == [second.id, first.id]


def test_a_run_that_is_paused_holds_no_device(runs: Runs) -> None:
    run = add(runs)
    runs.move(run.id, "starting", devices=["a"])
    assert runs.move(run.id, "pausing").devices == ["a"]
    assert runs.move(run.id, "paused").devices == []


def test_claims_keep_to_slots_quotas_and_numbers(runs: Runs) -> None:
    add(runs, 0, slots=4)
    add(runs, 1, slots=1)
    assert runs.claim(ClaimLimits(free_slots=2)) is None, "a small run does not pass a large one"
    assert runs.claim(ClaimLimits(free_slots=8, default_quota=2)).name == "run 1", "an owner's limit blocks only him"
    assert runs.claim(ClaimLimits(free_slots=8, quotas={"ada": 4})) is None
    assert runs.claim(ClaimLimits(free_slots=8, max_running=1)) is None
    assert runs.claim(ClaimLimits(free_slots=8, quotas={"ada": 5}, max_running=2)).name == "run 0"


def test_a_wait_is_kept(runs: Runs) -> None:
    run = add(runs)
    runs.move(run.id, "starting")
    runs.move(run.id, "queued", reason="again", due=1e9)
    assert runs.claim(ClaimLimits(free_slots=1)) is None


def test_pages_follow_each_other(runs: Runs) -> None:
    for number in range(5):
        add(runs, number, owner="ada" if number else "bob")
    first = runs.page(limit=2)
    second = runs.page(limit=2, after=first.next)
    assert [run.name for run in first.items + second.items] == ["run 4", "run 3", "run 2", "run 1"]
    assert [run.name for run in runs.page(after=second.next).items] == ["run 0"]
    assert runs.page(after=second.next).next is None
    assert [run.owner for run in runs.page(owner="bob").items] == ["bob"] and runs.owners() == ["ada", "bob"]
    assert runs.page(search="%").items == [] and len(runs.page(search="RUN").items) == 5


def test_adding_twice_is_adding_once(runs: Runs) -> None:
    run = add(runs)
    runs.move(run.id, "starting")
    assert add(runs, id=run.id).state == "starting" and runs.counts() == {"starting": 1}


def test_tokens_are_kept_as_hashes_and_end(database: Database) -> None:
    now = 100.0
    accounts = Accounts(database, lambda: now)
    token, secret = accounts.new_token("laptop", "ada", {"run", "read"}, expires=200.0)
    assert secret.startswith(PREFIX) and token.scopes == ("read", "run")
    with database.begin() as connection:
        assert secret not in str(connection.exec_driver_sql("SELECT * FROM tokens").all())
    assert accounts.by_secret(secret) is not None and accounts.by_secret(secret + "x") is None
    assert accounts.tokens()[0].used == 100.0
    now = 200.0
    assert accounts.by_secret(secret) is None and accounts.by_id(token.id) is None
    now = 150.0
    assert accounts.revoke(token.id) and not accounts.revoke(token.id) and accounts.by_secret(secret) is None


def test_the_audit_log_is_read_from_its_end(database: Database) -> None:
    accounts = Accounts(database)
    for number in range(3):
        accounts.audit("ada", "pause", f"{number}", {"n": number}, "127.0.0.1")
    latest = accounts.audit_log(limit=2)
    assert [entry.run_id for entry in latest] == ["2", "1"]
    assert [entry.run_id for entry in accounts.audit_log(before=latest[-1].seq)] == ["0"]


def test_a_key_answers_once(database: Database) -> None:
    now = 0.0
    answers = Answers(database, lambda: now)
    assert answers.begin("ada", "k", "digest", "not-made-yet") is None
    cut_off = answers.begin("ada", "k", "digest", "another")
    assert (cut_off.status, cut_off.run_id) == (None, "not-made-yet"), "cut off, or still being answered"
    answers.finish("ada", "k", 201, {"id": "x"})
    assert answers.begin("ada", "k", "digest").body == {"id": "x"}
    assert answers.begin("bob", "k", "digest") is None, "keys are an owner's own"
    with pytest.raises(KeyReusedError):
        answers.begin("ada", "k", "other")
    answers.forget("bob", "k")
    assert answers.begin("bob", "k", "other") is None
    now = 1e6
    assert answers.begin("ada", "k", "other") is None, "old keys are forgotten"


def test_texts_that_a_database_could_refuse(database: Database, runs: Runs) -> None:
    """NUL, halves of surrogate pairs, NaN and long names come from files that others wrote."""
    nasty = "a\0b\ud800c"
    run = add(runs, name=nasty + "x" * 500, config={"k\0": nasty}, config_name=nasty * 200, owner=nasty)
    runs.set_progress(run.id, {"reason": nasty, "nested": [{"a": nasty}], "loss": float("nan")})
    runs.move(run.id, "failed", reason=nasty)
    Events(database).append(run.id, "note", {"text": nasty})
    found, clean = runs.get(run.id), nasty.replace("\0", "\ufffd").replace("\ud800", "\ufffd")
    assert (found.reason, found.owner, found.config) == (clean, clean, {"k\ufffd": clean})
    assert found.progress == {"reason": clean, "nested": [{"a": clean}], "loss": "nan"}
    assert found.name == (clean + "x" * 500)[:200] and len(found.config_name) == 400
    assert [item.id for item in runs.page(search="a\0b", owner=nasty).items] == [run.id]


def test_an_id_that_is_too_long_is_not_cut_to_another(runs: Runs) -> None:
    run = add(runs)
    with pytest.raises(UnknownRunError):
        runs.get(run.id + "x" * 60)
