"""Taking a run in: what is checked, and in which order it is written, so that a kill at any instant loses nothing.

First the key of the request is taken together with the run's id, then the run folder appears whole (config.yaml and
service.json), then the row of the database, then the answer is kept. Whoever repeats a request that was cut off gets
the same id, and what is missing is made up for; without a repetition, a folder without its row is found when the
service starts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from starlette.datastructures import State

from kdscale.config.load import build_config, dump_config, load_config, shipped_configs
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.files import atomic_dir, sha256_json, write_text
from kdscale.pipeline.stages.registry import stages_of
from kdscale.service.access.identity import Actor
from kdscale.service.access.spec_rules import refused_fields
from kdscale.service.api.children import ask_child
from kdscale.service.api.schemas import Again, Submission, Target
from kdscale.service.database.folders import read_run_folder, write_run_folder
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.database.subscriptions import Subscription, subscribe, write_subscriptions
from kdscale.service.engines.targets import admin_fields, processes_of, read_target
from kdscale.service.ids import is_run_id, new_run_id
from kdscale.service.notices.recipients import parse_recipient
from kdscale.service.problems import Problem, of_error
from kdscale.service.scheduler.loop import LOCAL, most_slots
from kdscale.service.scheduler.machine import Machine, find_machine

_GUARD, _WRITING = threading.Lock(), dict[str, threading.Lock]()
_CREATED = 201


@dataclass(frozen=True)
class Taken:
    """A run that was taken in; `repeated`: by an earlier request with the same key."""

    run: Run
    repeated: bool = False


@dataclass(frozen=True)
class Planned:
    """What is going to be written: the config as it will be, and what was submitted."""

    config: Config
    config_name: str
    overrides: list[str]
    target: dict[str, Any]
    priority: int
    notify: list[Subscription]


def read_submission(state: State, actor: Actor, body: Submission | Again, run_id: str, parent: Run | None) -> Planned:
    """Check what was submitted. Raises a Problem that names every refused field."""
    if isinstance(body, Again):
        assert parent is not None
        tree, name, before = dict(parent.config), parent.config_name, parent.overrides
        target = body.target or Target.model_validate(parent.target)
        priority = parent.priority if body.priority is None else body.priority
    else:
        (tree, name), before, target, priority = _tree(state.runs, body), [], body.target, body.priority
    fixed = {"run_dir": str(state.settings.runs / run_id)} | ({"name": body.name} if body.name else {})
    for entry in body.set:
        if entry.partition("=")[0].strip() in fixed:
            raise Problem(422, "config", "the service says where a run lies", field=f"set ({entry[:60]})")
    try:
        config = build_config({"name": "run", **tree, **fixed}, "the config", body.set)
    except ConfigError as error:
        raise of_error(error, Config) from error
    wanted = target.model_dump(mode="json")
    read_target(wanted)
    refused = refused_fields(config, actor, state.settings)
    if not actor.is_admin:
        refused += [Problem(403, "scope", "only an admin may set this", field=field) for field in admin_fields(wanted)]
    if refused:
        entries = [{"field": "", "detail": problem.detail, **problem.extra} for problem in refused]
        raise Problem(403, "scope", "the config has settings that this token may not use", errors=entries)
    return Planned(config, name, [*before, *body.set], wanted, priority, _notify(state, body))


def _notify(state: State, body: Submission | Again) -> list[Subscription]:
    """Who is told of the run. Raises a Problem for an address that no notice may go to."""
    errors = []
    for index, entry in enumerate(body.notify):
        try:
            parse_recipient(entry.to, state.settings.notices)
        except ConfigError as error:
            errors.append({**of_error(error).extra, "detail": error.what, "field": f"notify.{index}.to"})
    if errors:
        raise Problem(422, "config", "notify has addresses that no notice may go to", errors=errors)
    return [Subscription(entry.to, tuple(entry.on)) for entry in body.notify]


def _tree(runs: Runs, body: Submission) -> tuple[dict[str, Any], str]:
    """The settings that a submission begins with, and their name."""
    if body.config is not None:
        return dict(body.config), ""
    name = body.config_name or ""
    if is_run_id(name):
        return dict(runs.get(name).config), name
    known = shipped_configs()
    if name not in known:
        raise Problem(
            422, "config", f"there is no config {name[:100]!r}", field="config_name",
            expected=f"the id of a run, or one of {', '.join(known)}",
        )  # fmt: skip
    return load_config(known[name]).resolved(), name


def slots_of(config: Config) -> int:
    """How many devices a run needs at once: the most processes that the config gives one of its stages."""
    if config.runtime.device == "cpu":
        return 1
    fields = [stage.processes for stage in stages_of(config) if stage.processes]
    return max([1, *(attrgetter(field)(config) or 1 for field in fields)])


def take(
    state: State,
    actor: Actor,
    body: Submission | Again,
    key: str | None = None,
    *,
    parent: Run | None = None,
    fork: bool = False,
) -> Taken:
    """Make a run of a submission, or find the one that an earlier request with the same key has made.

    `parent`: whose config it has; `fork`: it begins with what the parent has finished.

    Raises Problem and KdscaleError for what cannot be used; nothing is left of that.
    """
    run_id, parent_id = new_run_id(), parent.id if parent else None
    if key is not None:
        request = sha256_json({"body": body.model_dump(mode="json"), "parent": parent_id, "fork": fork})
        stored = state.answers.begin(actor.owner, key, request, run_id)
        if stored is not None and stored.status is not None:
            return Taken(state.runs.get(stored.run_id), repeated=True)
        run_id = stored.run_id if stored is not None else run_id
    try:
        plan = read_submission(state, actor, body, run_id, parent)
        run = _write(state, _new_run(state, actor, plan, run_id, parent_id), plan, parent if fork else None)
    except Exception:
        # it may be corrected and sent again; where the run folder is there, repeating it makes up for its row
        if key is not None and not (state.settings.runs / run_id).exists():
            state.answers.forget(actor.owner, key)
        raise
    if key is not None:
        state.answers.finish(actor.owner, key, _CREATED, {"id": run.id}, run.id)
    return Taken(run)


def _new_run(state: State, actor: Actor, plan: Planned, run_id: str, parent: str | None) -> NewRun:
    """The run of a plan. Raises a Problem for one that needs more slots than it may ever have."""
    slots = processes_of(plan.target, state.settings.engines) or slots_of(plan.config)
    settings, engine = state.settings, plan.target.get("engine", LOCAL)
    bounds = {
        f"as {'this machine' if engine == LOCAL else engine} has": most_slots(settings, machine_of(state), engine),
        f"as {actor.owner} may hold at once": settings.quotas.get(actor.owner, settings.default_quota),
    }
    for why, most in bounds.items():
        if most is not None and slots > most:
            raise Problem(
                422, "config", "the run would never start", expected=f"at most {most} slots, {why}",
                got=f"{slots} processes", hint="lower the processes of its stages, or choose another target",
            )  # fmt: skip
    return NewRun(
        id=run_id, name=plan.config.name, owner=actor.owner, priority=plan.priority, target=plan.target,
        slots=slots, config=plan.config.resolved(), config_name=plan.config_name,
        overrides=plan.overrides, parent=parent, folder=state.settings.runs / run_id,
    )  # fmt: skip


def machine_of(state: State) -> Machine:
    """What this machine has for runs to hold."""
    if getattr(state, "machine", None) is None:
        state.machine = state.scheduler.machine if state.scheduler is not None else find_machine(state.settings)
    found: Machine = state.machine
    return found


def _write(state: State, new: NewRun, plan: Planned, begin_with: Run | None) -> Run:
    """Write the folder, then the row; what is there already is left as it is."""
    with _one_at_a_time(new.id):
        write_subscriptions(state.settings, new.id, plan.notify)
        if new.folder.exists():  # a request that was cut off has written it
            new = read_run_folder(new.folder, new.config) or new
        else:
            with atomic_dir(new.folder) as tmp:
                write_text(tmp / "config.yaml", dump_config(plan.config))
                write_run_folder(replace(new, folder=tmp))
                if begin_with is not None:
                    seconds = state.settings.limits.check_seconds
                    ask_child("kdscale.pipeline.taking_over", str(begin_with.folder), str(tmp), seconds=seconds)
        with state.database.begin() as connection:
            run: Run = state.runs.add_in(connection, new)
            subscribe(connection, new.id, plan.notify)
    return run


@contextmanager
def _one_at_a_time(run_id: str) -> Iterator[None]:
    """Two requests with one key would write one folder."""
    with _GUARD:
        lock = _WRITING.setdefault(run_id, threading.Lock())
    with lock:
        yield
    with _GUARD:
        _WRITING.pop(run_id, None)
