"""One stage of a run: what it reads, what it leaves, and whether what it left still holds.

A stage is finished when its manifest exists; the manifest is written last and says what the stage was made from (the
config fields it depends on, digests of what it reads) and what it left (name, size, digest of every output). Same
inputs: nothing to do. Other inputs: the differences are named and the stage runs again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from kdscale.config.load import config_differences
from kdscale.config.root import Config
from kdscale.files import read_json, remove_tree, write_json
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import Artifact, RunFolder, now
from kdscale.runtime.progress import Reporter
from kdscale.runtime.versions import versions

Facts = Mapping[str, Any]
ModelRole = Literal["teacher", "model_to_prune", "model_to_learn_from"]


class InnerRunner(Protocol):
    """Brings stages of a run inside another run up to date; returns whether there was anything to do."""

    def __call__(
        self, outer: StageContext, config: Config, stages: tuple[str, ...], shared: Mapping[str, Path]
    ) -> bool:
        """`shared`: outputs of the outer run's stages, by name, that the inner run takes as its own."""


@dataclass(frozen=True)
class StageContext:
    """What every stage is given."""

    config: Config
    run: RunFolder
    teacher: Path
    reporter: Reporter
    pruned_from: Path | None = None  # with steps: the student of the step before; the teacher otherwise
    run_inner: InnerRunner | None = None  # set by the runner; a stage that runs other stages calls it

    @property
    def model_to_prune(self) -> Path:
        """The model that this run prunes."""
        return self.pruned_from or self.teacher

    @property
    def model_to_learn_from(self) -> Path:
        """The model whose distribution the student learns."""
        return self.model_to_prune if self.config.distill.teacher == "previous" else self.teacher


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the registry. Paths are artifacts of the run folder; a stage reads and writes nothing else there."""

    name: str
    title: str  # shown while it runs
    run: Callable[[StageContext], Facts]  # does the work; returns a few facts worth showing
    help: str = ""  # of the command that brings a run up to this stage; "": there is no such command
    run_rank: Callable[[StageContext], None] | None = None  # what each process does, where several share the stage
    config: tuple[str, ...] = ()  # dotted config fields, or whole sections, that the result depends on
    depends_on: Callable[[StageContext], Facts] | None = None  # what of the config matters, where that is no field
    model: ModelRole | None = None  # the larger model that it reads
    reads: tuple[Artifact, ...] = ()
    writes: tuple[Artifact, ...]
    resumes_from: tuple[Artifact, ...] = ()  # what a killed try leaves for the next; useless once the inputs changed
    resumable: bool = False  # has a folder work/<name> to resume from, removed when the stage is finished
    hand_editable: bool = False  # an output changed by hand is kept, and stages after it see the change
    disk_bytes: Callable[[StageContext, int], int] | None = None  # what it writes in all, by student parameters
    in_steps: bool = False  # each step on the way to the final student runs it too
    across_job: bool = False  # its processes are the ranks of the whole job, on all hosts
    watches_itself: bool = False  # its ranks have watchdogs of their own


def inputs_of(stage: Stage, context: StageContext) -> dict[str, Any]:
    """Everything the stage's result depends on, as plain values that can be compared and shown."""
    plain = context.config.resolved()
    made_from: dict[str, Any] = {"config": {name: _lookup(plain, name) for name in stage.config}, "files": {}}
    if stage.depends_on is not None:
        made_from["derived"] = dict(stage.depends_on(context))
    if stage.model is not None:
        made_from["files"]["teacher"] = digest_tree(getattr(context, stage.model))
    for artifact in stage.reads:
        made_from["files"][artifact.path] = digest_tree(context.run.at(artifact))
    return made_from


def _lookup(plain: dict[str, Any], dotted: str) -> Any:
    value: Any = plain
    for part in dotted.split("."):
        value = value[part]
    return value


def manifest_path(stage: Stage, run: RunFolder) -> Path:
    """Where the manifest of a finished stage is."""
    return run.stages / f"{stage.name}.json"


def why_stale(stage: Stage, context: StageContext, made_from: dict[str, Any]) -> list[str] | None:
    """None when the stage is finished and still holds; else the reasons to run it (empty: it never finished)."""
    path = manifest_path(stage, context.run)
    if not path.exists():
        return []
    manifest = read_json(path)
    reasons = [_short(str(difference)) for difference in config_differences(manifest["made_from"], made_from)]
    for name, digests in manifest["outputs"].items():
        present = digest_tree(context.run.path / name) if (context.run.path / name).exists() else {}
        if not present:
            reasons.append(f"{name} is gone")
        elif present != digests and not stage.hand_editable:
            changed = sorted(key for key in {*present, *digests} if present.get(key) != digests.get(key))
            reasons.append(f"{name} was changed after it was made ({', '.join(changed[:3])})")
    return reasons or None


def _short(line: str, width: int = 160) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def run_stage(stage: Stage, context: StageContext) -> bool:
    """Bring one stage up to date; returns whether there was anything to do."""
    run, reporter = context.run, context.reporter
    made_from = inputs_of(stage, context)
    reasons = why_stale(stage, context, made_from)
    if reasons is None:
        reporter.say(f"✓ {stage.title}: done before{_listed(read_json(manifest_path(stage, run))['facts'])}")
        return False
    for reason in reasons:
        reporter.say(f"  {stage.title} is done again: {reason}")
    _prepare_resuming(stage, run, made_from)
    manifest_path(stage, run).unlink(missing_ok=True)
    run.set_status(stage.name, "running")
    started = time.monotonic()
    reporter.say(f"→ {stage.title}")
    facts = dict(stage.run(context))
    seconds = round(time.monotonic() - started, 1)
    # What a stage was made from is what was there when it began; plan.json edited meanwhile shows up next time.
    write_json(
        manifest_path(stage, run),
        {
            "stage": stage.name,
            "made_from": made_from,
            "outputs": {artifact.path: digest_tree(run.at(artifact)) for artifact in stage.writes},
            "facts": facts,
            "seconds": seconds,
            "finished": now(),
            "versions": versions(),
        },
    )
    _remove_work(stage, run)
    run.set_status(stage.name, "done", seconds=seconds, facts=facts)
    reporter.say(f"✓ {stage.title}: {seconds:.1f} s{_listed(facts)}")
    return True


def _prepare_resuming(stage: Stage, run: RunFolder, made_from: dict[str, Any]) -> None:
    """Keep what a killed try left for resuming, but only if that try began from the same inputs."""
    if not stage.resumes_from and not stage.resumable:
        return
    marker = run.stages / f"{stage.name}.started.json"
    before = read_json(marker) if marker.exists() else None
    if before is not None and before != made_from:
        for artifact in stage.resumes_from:
            remove_tree(run.at(artifact))
    if before != made_from:
        _remove_work(stage, run)
    write_json(marker, made_from)


def _remove_work(stage: Stage, run: RunFolder) -> None:
    if stage.resumable and run.work.exists():
        remove_tree(run.work / stage.name)
        if not any(run.work.iterdir()):
            run.work.rmdir()


def _listed(facts: Facts) -> str:
    return "".join(f" · {name} {value}" for name, value in facts.items())
