"""From an event to a delivered notice: none lost and none doubled, whatever is killed in between."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from kdscale.errors import ConfigError
from kdscale.service.database.connection import Database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.database.schema import NOTICES
from kdscale.service.database.subscriptions import Subscription, subscribe, subscriptions_of
from kdscale.service.notices.occasions import KINDS, OCCASIONS, Notice, body_of, text_of
from kdscale.service.notices.outbox import LEASE_SECONDS, TRIES, Letter
from kdscale.service.notices.sender import Notices
from kdscale.service.notices.webhook import DeliveryError, secret_of, sign

HOOK = "https://hooks.example/a"


class Post:
    """Takes letters in the place of the network; fails as often as it is told to."""

    def __init__(self) -> None:
        self.got: list[Letter] = []
        self.failures: list[BaseException] = []

    def __call__(self, letter: Letter, now: float) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.got.append(letter)

    @property
    def kinds(self) -> list[str]:
        return [letter.kind for letter in self.got]


@pytest.fixture
def sent() -> Post:
    return Post()


@pytest.fixture
def make(settings: Callable[..., Any], database: Database, clock: Any, sent: Post) -> Callable[..., Notices]:
    return lambda **notices: Notices(settings(**notices), database, clock=clock, deliver=sent)


def finish(runs: Runs, run: Run, state: Any = "succeeded", reason: str = "") -> None:
    for step in ("starting", "running", state):
        runs.move(run.id, step, reason=reason if step == state else "")


def test_an_end_is_told_once_to_everybody_who_wants_it(
    make: Callable[..., Notices], runs: Runs, run: Run, database: Database, sent: Post
) -> None:
    notices = make(owners={"ada": (HOOK,), "*": (HOOK, "https://team.example/"), "eve": ("https://eve.example/",)})
    with database.begin() as connection:
        subscribe(connection, run.id, [Subscription("https://mine.example/", ("succeeded", "failed"))])
    finish(runs, run)
    assert notices.step() == 3
    assert {letter.recipient.address for letter in sent.got} == {HOOK, "https://team.example/", "https://mine.example/"}
    assert sent.kinds == ["succeeded"] * 3
    assert notices.step() == 0 and notices.outbox.counts() == {"sent": 3}


def test_what_happened_before_the_first_start_is_not_told(
    make: Callable[..., Notices], runs: Runs, run: Run, sent: Post
) -> None:
    finish(runs, run)
    assert make(owners={"*": (HOOK,)}).step() == 0
    assert sent.got == []


def test_what_happened_while_the_service_was_down_is_told(
    make: Callable[..., Notices], runs: Runs, run: Run, sent: Post
) -> None:
    make(owners={"*": (HOOK,)})
    finish(runs, run, "failed", "https://user:secret@host.example/ is gone")
    make(owners={"*": (HOOK,)}).step()
    assert sent.kinds == ["failed"]
    assert sent.got[0].body["data"]["reason"] == "https://***@host.example/ is gone"


def test_a_failure_is_tried_again_later_each_time_and_given_up_at_last(
    make: Callable[..., Notices], runs: Runs, run: Run, sent: Post, clock: Any, database: Database
) -> None:
    notices = make(owners={"*": (HOOK,)})
    finish(runs, run)
    sent.failures = [DeliveryError("no") for _ in range(TRIES)]
    waits = []
    notices.gather()
    for _ in range(TRIES):
        assert notices.send_due() == 0
        with database.read() as connection:
            row = connection.execute(select(NOTICES)).one()
        waits.append(row.due - clock.now)
        clock.now = row.due - 1
        assert notices.send_due() == 0  # not before it is due
        clock.now = row.due
    assert waits[:-1] == sorted(waits[:-1]) and waits[0] == 30 and 12 * 3600 < sum(waits[:-1]) < 48 * 3600
    assert notices.outbox.counts() == {"failed": 1} and sent.failures == []
    event = Events(database).since(0)[-1]
    assert (event.type, event.data["to"]) == ("notice_failed", "https://hooks.example/…")
    assert notices.step() == 0  # its own event is worth no notice


def test_a_final_refusal_is_not_tried_again(make: Callable[..., Notices], runs: Runs, run: Run, sent: Post) -> None:
    notices = make(owners={"*": (HOOK,)})
    finish(runs, run)
    sent.failures = [DeliveryError("gone", final=True)]
    notices.step()
    assert notices.outbox.counts() == {"failed": 1}


def test_a_receiver_that_fails_holds_up_nobody_else(
    make: Callable[..., Notices], runs: Runs, run: Run, sent: Post, clock: Any
) -> None:
    notices = make(owners={"*": ("https://dead.example/a", "https://dead.example/b", "https://well.example/")})
    tried: list[str] = []

    def deliver(letter: Letter, now: float) -> None:
        tried.append(letter.recipient.address)
        if "dead" in letter.recipient.address:
            raise DeliveryError("no")

    notices._deliver = deliver
    finish(runs, run)
    assert notices.step() == 1
    assert len(tried) == 2, "the second notice to the same host waits"
    for _ in range(3):
        clock.now += 60
        notices.send_due()
    assert {"https://dead.example/a", "https://dead.example/b"} <= set(tried), "and has its turn"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_a_notice_is_sent_loses_nothing(
    make: Callable[..., Notices], runs: Runs, run: Run, sent: Post, clock: Any, moment: str
) -> None:
    """Before the request: it is sent when the lease is over. After it: again, under the same id."""
    notices = make(owners={"*": (HOOK,)})
    finish(runs, run)

    class Killed(BaseException):
        pass

    def die(letter: Letter, now: float) -> None:
        if moment == "after":
            sent.got.append(letter)
        raise Killed

    notices._deliver = die
    with pytest.raises(Killed):
        notices.step()
    again = make(owners={"*": (HOOK,)})
    assert again.step() == 0, "the other sender may still be at it"
    clock.now += LEASE_SECONDS
    assert again.step() == 1
    assert len({letter.id for letter in sent.got}) == 1
    assert again.step() == 0


def test_two_senders_send_nothing_twice(
    make: Callable[..., Notices], runs: Runs, run: Run, sent: Post, clock: Any
) -> None:
    first, second = make(owners={"*": (HOOK,)}), make(owners={"*": (HOOK,)})
    finish(runs, run)
    first.gather()
    second.gather()
    letters = first.outbox.take(clock.now)
    assert len(letters) == 1 and second.send_due() == 0
    # the lease ends before the first one is done: its late word changes nothing
    clock.now += LEASE_SECONDS
    assert second.send_due() == 1
    first.outbox.failed(letters[0], clock.now, "late", final=True)
    assert first.outbox.counts() == {"sent": 1}


def test_threads_that_gather_at_once_write_each_notice_once(
    make: Callable[..., Notices], runs: Runs, run: Run, sent: Post
) -> None:
    notices = make(owners={"*": (HOOK,)})
    finish(runs, run)
    added: list[int] = []
    threads = [threading.Thread(target=lambda: added.append(notices.gather())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(added) == [0, 0, 0, 1]


def test_spikes_of_a_run_are_told_once_an_hour(
    make: Callable[..., Notices], run: Run, database: Database, sent: Post, clock: Any
) -> None:
    notices, events = make(owners={"*": (HOOK,)}), Events(database, clock)
    for step in range(5):
        events.append(run.id, "spike", {"step": step, "loss": 9.0, "median": 2.0, "limit": 3.0, "documents": "private"})
    notices.step()
    assert sent.kinds == ["spike"]
    assert {"step": 0, "loss": 9.0}.items() <= sent.got[0].body["data"].items()
    assert "documents" not in sent.got[0].body["data"], "what a text is called stays here"
    clock.now += 3601
    events.append(run.id, "spike", {"step": 9})
    notices.step()
    assert sent.kinds == ["spike"] * 2


def test_a_run_that_hangs_is_told(
    make: Callable[..., Notices], run: Run, database: Database, sent: Post, clock: Any
) -> None:
    notices = make(owners={"*": (HOOK,)})
    Events(database, clock).append(run.id, "hung", {"since": 0.0})
    notices.step()
    assert sent.kinds == ["hung"] and sent.got[0].body["data"]["since"] == "1970-01-01T00:00:00+00:00"


def test_old_spikes_and_runs_that_ended_before_they_were_found_are_not_told(
    make: Callable[..., Notices], runs: Runs, database: Database, sent: Post, clock: Any, tmp_path: Any
) -> None:
    notices = make(owners={"*": (HOOK,)})
    found = runs.add(NewRun(name="x", owner="ada", config={}, folder=tmp_path, state="failed", origin="command line"))
    Events(database, lambda: clock.now - 100_000).append(found.id, "spike", {"step": 1})
    assert notices.step() == 0


def test_a_preemption_is_told_and_a_pause_on_request_is_not(
    make: Callable[..., Notices], runs: Runs, run: Run, sent: Post, clock: Any
) -> None:
    notices = make(owners={"*": (HOOK,)})

    def move(state: Any, **fields: Any) -> None:
        runs.move(run.id, state, **fields)
        notices.step()

    move("starting")
    move("running")
    move("recovering", exit_code=9)  # tried again after a failure
    move("running")
    move("recovering", exit_code=None)  # lost
    move("running")
    move("recovering", exit_code=75)
    assert sent.kinds == ["preempted"]
    clock.now += 3601
    move("running")
    move("recovering")  # back in the queue of its engine
    move("pausing")
    move("paused", exit_code=75)
    assert sent.kinds == ["preempted"] * 2


def test_a_subscription_that_the_settings_allow_no_more_is_left_out(
    make: Callable[..., Notices], runs: Runs, run: Run, database: Database, sent: Post
) -> None:
    with database.begin() as connection:
        subscribe(connection, run.id, [Subscription("http://10.0.0.7/", ("succeeded",))])
        subscribe(
            connection, run.id, [Subscription("http://10.0.0.8/", ("succeeded",)), Subscription(HOOK, ("failed",))]
        )
        assert [item.to for item in subscriptions_of(connection, run.id)] == ["http://10.0.0.8/", HOOK]
    notices = make(webhook_hosts=("10.0.0.7",))
    finish(runs, run)
    assert notices.step() == 0
    runs.remove(run.id)
    with database.begin() as connection:
        assert subscriptions_of(connection, run.id) == []


def test_wrong_settings_are_refused_at_the_start(make: Callable[..., Notices]) -> None:
    for wrong in ({"owners": {"ada": ("ftp://x/",)}}, {"smtp_host": "mail.example"}):
        with pytest.raises(ConfigError):
            make(**wrong)


def test_a_notice_travels_over_the_network_as_it_is_documented(
    settings: Callable[..., Any], database: Database, runs: Runs, run: Run, clock: Any, receiver: Any
) -> None:
    url = f"http://127.0.0.1:{receiver.port}/hook"
    chosen = settings(webhook_hosts=("127.0.0.1",), owners={"ada": (url,)}, service_url="https://kd.example/")
    notices = Notices(chosen, database, clock=clock)
    finish(runs, run)
    receiver.answer = 500
    assert notices.step() == 0
    receiver.answer, clock.now = 204, clock.now + 30
    assert notices.step() == 1
    (_, first, _), (_, second, body) = receiver.got
    assert first["webhook-id"] == second["webhook-id"]
    assert int(second["webhook-timestamp"]) == int(first["webhook-timestamp"]) + 30
    secret = secret_of(chosen.folder, None)
    assert second["webhook-signature"] == sign(secret, second["webhook-id"], int(second["webhook-timestamp"]), body)
    told = json.loads(body)
    assert told["type"] == "run.succeeded" and told["data"]["run"]["id"] == run.id
    assert told["data"]["link"] == f"https://kd.example/runs/{run.id}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_told(run: Run, kind: Any) -> None:
    facts = {"reason": "a\nb", "loss": float("nan"), "paths": ["student/", "\x1b[2J"]}
    body = body_of(Notice("topic", kind, run, 0.0, facts), None)
    assert json.loads(json.dumps(body, allow_nan=False))["timestamp"] == "1970-01-01T00:00:00+00:00"
    text = text_of(kind, body)
    assert text.startswith(OCCASIONS[kind].sentence.format(name="tiny")) and "\x1b" not in text


def test_old_notices_are_forgotten_and_waiting_ones_never(
    make: Callable[..., Notices], runs: Runs, run: Run, database: Database, clock: Any
) -> None:
    notices = make(owners={"*": (HOOK, "https://other.example/")})
    finish(runs, run)
    notices.gather()
    with database.begin() as connection:
        connection.execute(update(NOTICES).where(NOTICES.c.address == HOOK).values(state="sent"))
    assert notices.outbox.forget(clock.now + 1e9) == 1
    assert notices.outbox.counts() == {"waiting": 1}


def test_the_thread_goes_on_after_an_error(make: Callable[..., Notices], monkeypatch: pytest.MonkeyPatch) -> None:
    notices, stop, steps = make(), threading.Event(), itertools.count()
    waits: list[float] = []

    def step() -> int:
        if next(steps) == 2:
            stop.set()
        raise OSError("no space left on device")

    monkeypatch.setattr(notices, "step", step)
    monkeypatch.setattr(stop, "wait", lambda seconds: waits.append(seconds) or stop.is_set())
    notices.run_forever(stop)
    assert waits == [2.0, 60.0, 60.0, 60.0]


def test_a_try_that_outlived_its_lease_decides_nothing(
    make: Callable[..., Notices], runs: Runs, run: Run, clock: Any
) -> None:
    outbox = make(owners={"*": (HOOK,)}).outbox
    notices = make(owners={"*": (HOOK,)})
    finish(runs, run)
    notices.gather()
    first = outbox.take(clock.now)
    clock.now += LEASE_SECONDS
    second = outbox.take(clock.now)
    outbox.failed(first[0], clock.now, "too late", final=True)
    assert outbox.counts() == {"waiting": 1}, "the other try is under way"
    outbox.sent(second[0], clock.now)
    assert outbox.counts() == {"sent": 1}
