"""What is deleted and when, and what never is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.runs.folder import RunFolder
from kdscale.service.database.accounts import Accounts
from kdscale.service.database.connection import Database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.notices.outbox import Letter
from kdscale.service.notices.sender import Notices
from kdscale.service.operations.retention import DAY, Retention
from kdscale.service.operations.trash import in_trash, move_to_trash, place_in_trash
from kdscale.service.settings import NoticeSettings, RetentionSettings, ServiceSettings

HOOK = "https://hooks.example/a"
EVERYTHING = {"checkpoints_after": 1.0, "logs_after": 1.0, "students_after": 10.0}


class Service:
    """A retention with its notices, whose letters arrive when `arrive` says so."""

    def __init__(self, settings: ServiceSettings, database: Database, clock: Any):
        self.settings, self.clock, self.told = settings, clock, list[Letter]()
        self.notices = Notices(settings, database, clock=clock, deliver=lambda letter, now: self.told.append(letter))
        self.retention = Retention(settings, database, self.notices, clock)
        self.events, self.accounts = Events(database), Accounts(database)

    def after(self, days: float) -> set[str]:
        """What a pass deletes so many days later."""
        self.clock.now += days * DAY
        return {removal.path.relative_to(self.settings.folder).as_posix() for removal in self.retention.step()}


@pytest.fixture
def service(settings: ServiceSettings, database: Database, clock: Any) -> Callable[..., Service]:
    def make(owners: Any = None, **retention: Any) -> Service:
        changes = {
            "retention": RetentionSettings(**retention),
            "notices": NoticeSettings(owners={"ada": (HOOK,)} if owners is None else owners),
        }
        return Service(settings.model_copy(update=changes), database, clock)

    return make


def test_nothing_is_deleted_unless_the_settings_say_so(service: Callable[..., Service], ended: Any) -> None:
    ended(), ended("failed")
    made = service()
    assert made.after(10_000) == set() and made.retention.plan() == []


def test_checkpoints_and_logs_go_to_the_trash_and_from_there_for_good(
    service: Callable[..., Service], ended: Any, settings: ServiceSettings
) -> None:
    run: Run = ended()
    made = service(checkpoints_after=3.0, logs_after=5.0, trash_after=7.0)
    runs, jobs = f"runs/{run.id}", f"jobs/{run.id}"
    assert made.after(2.9) == set()
    assert made.after(0.2) == {f"{runs}/checkpoints", f"{runs}/steps/one/checkpoints"}
    assert not (run.folder / "checkpoints").exists() and (run.folder / "student").exists()
    assert [item.what for item in in_trash(settings)] == ["checkpoints", "checkpoints"]
    assert all((item.path / "step_10").exists() or (item.path / "step_5").exists() for item in in_trash(settings))
    assert made.after(2) == {f"{jobs}/1/output.log"}
    assert {path.name for path in (settings.jobs / run.id).rglob("*") if path.is_file()} == {"exit.json", "state.json"}
    assert len(made.after(5)) == 2 and [item.what for item in in_trash(settings)] == ["output_log"]
    assert len(made.after(2.1)) == 1 and in_trash(settings) == []


def test_every_deletion_is_an_event_of_its_run_and_a_line_of_the_audit_log(
    service: Callable[..., Service], ended: Any
) -> None:
    run: Run = ended()
    made = service(checkpoints_after=0.0, trash_after=0.0)
    made.after(0.1)
    made.after(0.1)
    events = [(event.type, event.data["path"].split("/")[0]) for event in made.events.since(0, run.id)[3:]]
    assert events == [("removed", "runs")] * 2 + [("trash_emptied", "trash")] * 2
    log = made.accounts.audit_log()
    assert len(log) == 4 and {entry.actor for entry in log} == {"retention"}
    assert {entry.run_id for entry in log} == {run.id} and log[-1].detail["bytes"] == len("state")


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_what_a_run_goes_on_from_stays(service: Callable[..., Service], ended: Any, state: str) -> None:
    run: Run = ended("failed")
    service(**EVERYTHING).after(1000)
    assert (run.folder / "checkpoints").exists() and (run.folder / "student").exists()


def test_runs_of_the_command_line_and_folders_elsewhere_are_left_alone(
    service: Callable[..., Service], ended: Any, tmp_path: Path, settings: ServiceSettings
) -> None:
    elsewhere = tmp_path / "elsewhere"
    ended(folder=elsewhere)
    linked: Run = ended()
    linked.folder.rename(tmp_path / "moved")
    linked.folder.symlink_to(tmp_path / "moved")
    assert service(**EVERYTHING).after(1000) == set()
    assert (elsewhere / "checkpoints").exists() and (tmp_path / "moved" / "checkpoints").exists()


def test_a_link_goes_and_what_it_leads_to_stays(
    service: Callable[..., Service], ended: Any, tmp_path: Path, settings: ServiceSettings
) -> None:
    run: Run = ended()
    (run.folder / "checkpoints").rename(tmp_path / "large disk")
    (run.folder / "checkpoints").symlink_to(tmp_path / "large disk")
    made = service(checkpoints_after=1.0, trash_after=1.0)
    made.after(2)
    made.after(2)
    assert in_trash(settings) == [] and (tmp_path / "large disk" / "step_10").exists()


def test_a_link_out_of_the_home_folder_is_not_followed_on_the_way(settings: ServiceSettings, tmp_path: Path) -> None:
    from kdscale.errors import RunFolderError

    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    settings.runs.mkdir(parents=True)
    (settings.runs / "link").symlink_to(tmp_path / "out")
    place = place_in_trash(settings, "000000001-0000000", "checkpoints", 0.0)
    with pytest.raises(RunFolderError, match="leads out"):
        move_to_trash(settings, settings.runs / "link" / "checkpoints", place)
    assert (tmp_path / "out" / "checkpoints").exists()


def test_a_folder_that_a_process_holds_waits(service: Callable[..., Service], ended: Any) -> None:
    run: Run = ended()
    made = service(checkpoints_after=1.0)
    with RunFolder(run.folder).lock():
        assert made.after(2) == set()
    assert len(made.after(0)) == 2


def test_a_student_goes_only_after_its_owner_was_told_and_some_days_more(
    service: Callable[..., Service], ended: Any
) -> None:
    run: Run = ended()
    made = service(students_after=10.0, notice_days=4.0)
    assert made.after(5.9) == set() and made.notices.outbox.counts() == {}
    assert made.after(0.2) == set() and made.notices.outbox.counts() == {"waiting": 1}
    # the receiver is down for a week: nothing goes, and the days begin when the notice arrives
    assert made.after(7) == set() and (run.folder / "student").exists()
    assert [item.kept for item in made.retention.plan()] == ["ada was not told yet"] * 2
    made.notices.send_due()
    assert [letter.kind for letter in made.told] == ["removal"]
    assert made.told[0].body["data"]["paths"] == ["student/", "quantized/"]
    assert made.after(3.9) == set()
    assert made.after(0.2) == {f"runs/{run.id}/student", f"runs/{run.id}/quantized"}
    assert made.after(1000) and len(made.told) == 1, "the trash is emptied, and nobody is told twice"
    assert (run.folder / "steps/one/student").exists(), "students of steps are no one's result"


def test_a_long_notice_is_given_once(service: Callable[..., Service], ended: Any) -> None:
    run: Run = ended()
    made = service(students_after=1.0, notice_days=40.0)
    made.after(1)
    made.notices.send_due()
    for _ in range(4):
        made.after(9.9)
        made.notices.send_due()
    assert made.after(1) == {f"runs/{run.id}/student", f"runs/{run.id}/quantized"} and len(made.told) == 1


def test_a_student_stays_when_nobody_can_be_told(service: Callable[..., Service], ended: Any) -> None:
    run: Run = ended()
    made = service({}, students_after=1.0, notice_days=0.0)
    assert made.after(1000) == set() and (run.folder / "student").exists()
    assert {item.kept for item in made.retention.plan()} == {
        "ada has no address in notices.owners, so nobody can be told"
    }


def test_a_student_that_another_run_reads_stays_until_that_one_has_ended(
    service: Callable[..., Service], ended: Any, database: Database, settings: ServiceSettings
) -> None:
    run, runs = ended(), Runs(database)
    config = {"teacher": {"path": str(run.folder / "student")}}
    other = runs.add(NewRun(name="next", owner="ada", config=config, folder=settings.runs / "next", state="paused"))
    made = service(students_after=1.0, notice_days=0.0)
    made.after(2)
    made.notices.send_due()
    assert made.after(20) == set() and other.id in made.retention.plan()[0].kept
    runs.move(other.id, "cancelled")
    assert made.after(1) == {f"runs/{run.id}/student", f"runs/{run.id}/quantized"}


def test_a_notice_that_was_given_up_deletes_nothing(
    service: Callable[..., Service], ended: Any, database: Database
) -> None:
    from sqlalchemy import update

    from kdscale.service.database.schema import NOTICES

    run: Run = ended()
    made = service(students_after=1.0, notice_days=0.0)
    made.after(2)
    with database.begin() as connection:
        connection.execute(update(NOTICES).values(state="failed"))
    assert made.after(1000) == set() and (run.folder / "student").exists()


def test_a_run_that_goes_on_again_keeps_its_logs(
    service: Callable[..., Service], ended: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is resumed between the plan and the deed."""
    run: Run = ended("failed")
    made, plan = service(logs_after=1.0), Retention.plan

    def then_resume(self: Retention) -> Any:
        found = plan(self)
        Runs(database).ask(run.id, "resume")
        return found

    monkeypatch.setattr(Retention, "plan", then_resume)
    assert made.after(2) == set()
    assert list((made.settings.jobs / run.id).glob("*/output.log"))


def test_what_somebody_else_put_into_the_trash_is_left_alone(
    service: Callable[..., Service], settings: ServiceSettings
) -> None:
    (settings.trash / "mine").mkdir(parents=True)
    (settings.trash / "20200101T000000Z.x.student.000000").mkdir()
    assert service(trash_after=0.0).after(1000) == set()
    assert len(list(settings.trash.iterdir())) == 2


def test_a_kill_between_the_record_and_the_rename_is_made_up_for(
    service: Callable[..., Service], ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Run = ended()
    made = service(checkpoints_after=1.0)

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("kdscale.service.operations.retention.move_to_trash", die)
        made.after(2)
    assert (run.folder / "checkpoints").exists()
    assert len(made.after(0)) == 2 and not (run.folder / "checkpoints").exists()


def test_only_the_process_that_schedules_deletes(service: Callable[..., Service], ended: Any, clock: Any) -> None:
    run: Run = ended()
    made, stop = service(checkpoints_after=0.0), threading.Event()
    clock.now += DAY

    def follows() -> bool:
        stop.set()
        return False

    made.retention.run_forever(stop, follows)
    assert (run.folder / "checkpoints").exists()
    stop.clear()

    def leads() -> bool:
        stop.set()
        return True

    made.retention.run_forever(stop, leads)
    assert not (run.folder / "checkpoints").exists()
