"""The service's database in a real Postgres: what the unit tests say of SQLite, and what only several writers show."""

from __future__ import annotations

import importlib.util
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kdscale.errors import ConfigError, ServiceError
from kdscale.service.app import make_app
from kdscale.service.database.connection import Database, open_database
from kdscale.service.database.events import Events
from kdscale.service.database.folders import write_run_folder
from kdscale.service.database.runs import ClaimLimits, NewRun, Run, Runs
from kdscale.service.database.schema import METADATA
from kdscale.service.database.subscriptions import Subscription, subscriptions_of, write_subscriptions
from kdscale.service.ids import new_run_id
from kdscale.service.notices.sender import Notices
from kdscale.service.settings import NoticeSettings, ServiceSettings
from kdscale.service.states import WrongTransitionError
from kdscale.service.watching.rebuild import rebuild
from kdscale.service.watching.watcher import Watcher

THREADS = 4


def _tests_of(path: str) -> dict[str, Any]:
    """The tests of a file of unit tests, with its fixtures; `database` below takes the place of theirs."""
    file = Path(__file__).resolve().parents[2] / "unit" / "service" / path
    spec = importlib.util.spec_from_file_location(f"{file.stem}_in_postgres", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        name: value for name, value in vars(module).items() if name in ("runs", "clock") or name.startswith("test_")
    }


globals().update(_tests_of("test_database.py"))


@pytest.fixture(scope="module")
def url(postgres: Callable[[], str]) -> str:
    return postgres()


@pytest.fixture
def settings(url: str, tmp_path: Path) -> ServiceSettings:
    return ServiceSettings(home=str(tmp_path / "home"), database=url)


@pytest.fixture
def database(settings: ServiceSettings) -> Iterator[Database]:
    """The same for every test, as a new one takes a second; emptied, and its numbers begin anew."""
    opened = open_database(settings)
    names = ", ".join(table.name for table in METADATA.sorted_tables)
    with opened.begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
    yield opened
    opened.close()


def add(runs: Runs, number: int = 0, **fields: Any) -> Run:
    values = {"name": f"run {number}", "owner": "ada", "config": {}, "folder": Path(f"/runs/{number}")}
    return runs.add(NewRun(**{**values, "id": new_run_id(number), **fields}))


def together(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What `count` threads return that begin at the same moment."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_processes_that_open_a_new_database_at_once_migrate_it_once(
    settings: ServiceSettings, postgres: Callable[[], str]
) -> None:
    empty = settings.model_copy(update={"database": postgres()})
    opened = together(lambda _: open_database(empty))
    assert [Runs(database).counts() for database in opened] == [{}] * THREADS
    for database in opened:
        database.close()


def test_no_run_is_claimed_twice_and_none_is_left(database: Database) -> None:
    runs = Runs(database)
    ids = {add(runs, number, owner=f"owner {number % 3}", priority=number % 2).id for number in range(40)}

    def claim_all(_: int) -> list[str]:
        found = []
        while (run := runs.claim(ClaimLimits(free_slots=1000))) is not None:
            found.append(run.id)
        return found

    claimed = together(claim_all)
    together_ = list(itertools.chain(*claimed))
    assert len(together_) == len(ids) and set(together_) == ids
    assert runs.counts() == {"starting": 40}
    assert [event.data["state"] for event in Events(database).since(0)].count("starting") == 40


def test_quotas_hold_when_several_claim_at_once(database: Database) -> None:
    runs = Runs(database)
    for number in range(20):
        add(runs, number, owner=("ada", "eve")[number % 2])
    limits = ClaimLimits(free_slots=1000, default_quota=3, max_running=5)
    claimed = [run for run in together(lambda _: [runs.claim(limits) for _ in range(5)]) for run in run if run]
    assert len(claimed) == 5
    assert max([run.owner for run in claimed].count(owner) for owner in ("ada", "eve")) <= 3


def test_services_that_start_at_once_tell_from_the_same_event_on(database: Database, settings: ServiceSettings) -> None:
    add(Runs(database))
    for notices in together(lambda _: Notices(settings, database)):
        assert notices.gather() == 0


def test_events_are_read_in_the_order_in_which_they_can_be_seen(database: Database) -> None:
    """A reader that asks for what follows the last number misses none, though four write at once."""
    runs = Runs(database)
    ids = [add(runs, number).id for number in range(THREADS)]
    events, done, seen = Events(database), threading.Event(), []

    def read() -> None:
        last = 0
        while True:
            finished = done.is_set()
            for event in events.since(last):
                last = event.seq
                seen.append(event.seq)
            if finished:
                return

    reader = threading.Thread(target=read)
    reader.start()
    together(lambda number: [events.append(ids[number], "note", {"n": n}) for n in range(50)])
    done.set()
    reader.join()
    assert seen == sorted(seen) and len(seen) == THREADS * 51


def test_of_two_that_move_a_run_one_is_told_that_it_came_late(database: Database) -> None:
    runs = Runs(database)
    run = add(runs)

    def move(_: int) -> str:
        try:
            return runs.move(run.id, "starting", expect={"queued"}).state
        except WrongTransitionError:
            return "late"

    assert sorted(together(move)) == ["late"] * (THREADS - 1) + ["starting"]


def test_a_request_that_races_with_the_scheduler_is_answered_for_the_state_that_it_meets(database: Database) -> None:
    """Asked to cancel while it starts: never refused because the run moved on between two statements."""
    runs = Runs(database)
    for number in range(10):
        run = add(runs, number)
        runs.move(run.id, "starting")

        def act(which: int, run: Run = run) -> None:
            if which == 0:
                runs.ask(run.id, "cancel")
            else:
                with suppress(WrongTransitionError):
                    runs.move(run.id, "running", expect={"starting"})

        together(act, 2)
        assert runs.get(run.id).state == "cancelling"


def test_a_lost_database_is_made_anew_from_the_folders(database: Database, settings: ServiceSettings) -> None:
    runs = Runs(database)
    done, waiting = (
        runs.add(
            NewRun(
                id=run_id, name="tiny", owner="ada", folder=settings.runs / run_id,
                config={"name": "tiny", "teacher": {"path": "t"}, "prune": {"target_params": "50%"}},
            )
        )
        for run_id in map(new_run_id, (1, 2))
    )  # fmt: skip
    for run in (done, waiting):
        write_run_folder(run)
        write_subscriptions(settings, run.id, [Subscription("https://hooks.example/", ("failed",))])
    runs.move(done.id, "starting")
    runs.move(done.id, "failed", reason="a bug", exit_code=7)
    Watcher(settings, database).step()  # keeps the states beside the jobs
    with database.begin() as connection:
        for table in reversed(METADATA.sorted_tables):
            connection.execute(table.delete())
    assert set(rebuild(settings, database)) == {done.id, waiting.id}
    found = [runs.get(run.id) for run in (done, waiting)]
    assert [(run.state, run.reason, run.exit_code) for run in found] == [("failed", "a bug", 7), ("queued", "", None)]
    assert rebuild(settings, database) == []
    with database.read() as connection:
        assert [item.on for item in subscriptions_of(connection, done.id)] == [("failed",)]


def test_several_senders_deliver_each_notice_once(database: Database, settings: ServiceSettings) -> None:
    runs, got = Runs(database), list[str]()
    hooks = tuple(f"https://hooks{number}.example/" for number in range(5))
    chosen = settings.model_copy(update={"notices": NoticeSettings(owners={"*": hooks})})
    senders = [Notices(chosen, database, deliver=lambda letter, _: got.append(letter.id)) for _ in range(THREADS)]
    for number in range(4):
        run = add(runs, number)
        runs.move(run.id, "starting")
        runs.move(run.id, "succeeded")
    together(lambda number: [senders[number].step() for _ in range(4)])
    assert len(got) == len(set(got)) == 20
    assert senders[0].outbox.counts() == {"sent": 20}


def test_the_application_works_over_postgres(database: Database, settings: ServiceSettings) -> None:
    app = make_app(settings, database)
    _, secret = app.state.accounts.new_token("laptop", "ada", ["admin"])
    body = {"config": {"teacher": {"path": "hf:org/model"}, "prune": {"target_params": "50%"}}}
    headers = {"authorization": f"Bearer {secret}"}
    with TestClient(app, "http://localhost", headers=headers) as client:
        made = [
            client.post("/v1/runs", json=body, headers={"Idempotency-Key": f"key-{number // 2}"}).json()["id"]
            for number in range(4)
        ]
        assert made[0] == made[1] != made[2] == made[3]
        first = client.get("/v1/runs", params={"limit": 1, "search": "run"}).json()
        second = client.get("/v1/runs", params={"limit": 1, "after": first["next"]}).json()
        assert [item["id"] for item in first["items"] + second["items"]] == [made[2], made[0]]
        assert client.post(f"/v1/runs/{made[0]}/cancel").json()["state"] == "cancelled"
        events = client.get(f"/v1/runs/{made[0]}/events").json()["items"]
        assert [event["data"]["state"] for event in events] == ["queued", "cancelled"]
        assert 'kdscale_runs{state="cancelled"} 1.0' in client.get("/metrics").text
        assert client.get("/runs", headers={"accept": "text/html"}).status_code == 200
    assert len(app.state.accounts.audit_log()) == 5


def test_a_password_comes_from_a_file(settings: ServiceSettings, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("not asked for here\n")
    open_database(settings.model_copy(update={"database_password_file": str(tmp_path / "password")})).close()
    with pytest.raises(ConfigError, match="database_password_file"):
        open_database(settings.model_copy(update={"database_password_file": str(tmp_path / "missing")}))


def test_a_database_that_is_not_there_is_told_in_words(settings: ServiceSettings) -> None:
    wrong = settings.model_copy(update={"database": f"{settings.database}".replace("/test", "/missing")})
    with pytest.raises(ServiceError, match="cannot be opened") as caught:
        open_database(wrong)
    assert "kdscale@" not in str(caught.value)


def test_a_database_of_a_kind_that_is_not_known_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="database"):
        open_database(ServiceSettings(home=str(tmp_path), database="mysql://root:secret@localhost/x"))
    with pytest.raises(ConfigError, match="database"):
        open_database(ServiceSettings(home=str(tmp_path), database="not a url"))
    with pytest.raises(ConfigError, match="database"):
        open_database(ServiceSettings(home=str(tmp_path), database="sqlite://"))
