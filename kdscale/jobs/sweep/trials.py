"""The trials of a sweep: each a run of its own in a process of its own, chosen and judged through Optuna.

folder/  sweep.json and sweep.html (results)  best.yaml  study.db (Optuna's own storage)
  base/ (the run that trials begin as copies of: text, importance, pruned student)
  trials/<number>/ (run folders; <number>.yaml and <number>.log beside them)

A trial begins as hard links to what the base run made; a stage whose inputs its draw changes is done again. A killed
sweep goes on: trials that ran then are drawn again with the same values, in the same folders, from their checkpoints.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdscale.config.load import dump_config
from kdscale.config.root import Config
from kdscale.config.sweep import OBJECTIVES, SweepConfig
from kdscale.errors import ConfigError, Interrupted, RunFolderError
from kdscale.files import explain_os_errors, read_json, remove_tree, sha256_json, write_text
from kdscale.jobs.sweep.space import drawn, grid_points, grid_size, trial_config
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.stage import manifest_path
from kdscale.pipeline.stages.registry import stages_until
from kdscale.runs.folder import CHECKPOINTS, EVAL_FILE, PRUNED, STUDENT, RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runs.models import DISTILLED
from kdscale.runtime.packages import require_packages
from kdscale.runtime.progress import Reporter

if TYPE_CHECKING:
    import optuna

SHARED_UNTIL, TRIAL_UNTIL = "prune", "eval"
_FREE = {"trials", "keep"}  # of the sweep's settings: they may change while it goes on
_POLL_SECONDS = 1.0
_STOP_SECONDS = 120.0  # that a trial has to save its checkpoint
_BEST_SHARE = 3  # a trial goes on where it is among the best 1/3 so far
_LAST_LINES = 20  # of a failed trial's log, in which its error is looked for


@dataclass
class Sweep:
    """A sweep that runs: its settings, the config that trials change, its study."""

    settings: SweepConfig
    base: Config
    study: optuna.Study
    reporter: Reporter
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def folder(self) -> Path:
        """Where everything of the sweep is."""
        return Path(self.settings.folder)

    @property
    def trials(self) -> int:
        """How many trials there are to be: those asked for, and of a grid no more than it has points."""
        asked = self.settings.trials
        return min(asked, grid_size(self.settings)) if self.settings.sampler == "grid" else asked


def open_study(settings: SweepConfig) -> optuna.Study:
    """The study in the sweep's folder, a new one if there is none. Raises RunFolderError for that of another sweep."""
    require_packages("kdscale sweep", ("optuna",), "sweep")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = Path(settings.folder) / "study.db"
    better: Literal["minimize", "maximize"] = "minimize" if OBJECTIVES[settings.objective] else "maximize"
    smaller: list[Literal["minimize", "maximize"]] = ["minimize"] if settings.size else []
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path.absolute()}",
            study_name="sweep",
            directions=[better, *smaller],
            load_if_exists=True,
        )
    except Exception as error:  # whatever SQLite or Optuna says of a file that is no study
        raise RunFolderError(f"{path} cannot be opened", expected="Optuna's study", got=str(error)[:300]) from error
    decisive = {key: value for key, value in settings.model_dump(mode="json").items() if key not in _FREE}
    identity = sha256_json(decisive)
    if study.user_attrs.setdefault("sweep", identity) != identity:
        raise RunFolderError(
            f"{settings.folder} belongs to another sweep", expected="the settings that it was begun with",
            got="others; only " + " and ".join(sorted(_FREE)) + " may change", hint="choose another folder",
        )  # fmt: skip
    if "sweep" not in study.user_attrs:
        study.set_user_attr("sweep", identity)
    if settings.sampler == "grid":
        for point in grid_points(settings)[len(trials_of(study)) : settings.trials]:
            study.enqueue_trial(point)
    return study


def run_sweep(settings: SweepConfig, base: Config, workers: int, reporter: Reporter) -> optuna.Study:
    """Run what is left of a sweep's trials, `workers` at a time. Raises Interrupted on a signal; nothing is lost."""
    with RunFolder(Path(settings.folder)).lock():
        sweep = Sweep(settings, base, open_study(settings), reporter)
        take_up_again(sweep.study)
        if finished(sweep.study) < sweep.trials:
            reporter.say("⇒ what all trials share")
            run_until(base, SHARED_UNTIL, reporter)
        _run_all(sweep, workers)
    return sweep.study


def _run_all(sweep: Sweep, workers: int) -> None:
    """Keep `workers` trials going until there are as many as asked for."""
    with ThreadPoolExecutor(workers, thread_name_prefix="trial") as pool:
        futures = [pool.submit(_work, sweep) for _ in range(workers)]
        old = {number: signal.signal(number, _raise) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for future in futures:
                while not future.done():
                    time.sleep(_POLL_SECONDS / 10)
                future.result()
        except BaseException:
            sweep.stop.set()
            raise
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _raise(number: int, _frame: object) -> None:
    raise Interrupted(number, "; trials that were running go on from their checkpoints")


def take_up_again(study: optuna.Study) -> None:
    """Draw trials that a killed sweep left running once more, with the same values in the same folders."""
    import optuna

    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"folder": folder_of(trial)})


def folder_of(trial: optuna.trial.FrozenTrial) -> int:
    """The number of a trial's folder: that of the trial which was drawn first with its values."""
    return int(trial.user_attrs.get("folder", trial.number))


def trial_folder(sweep_folder: Path, trial: optuna.trial.FrozenTrial) -> Path:
    """The run folder of a trial."""
    return sweep_folder / "trials" / f"{folder_of(trial):04d}"


def trials_of(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """All trials in the order of their folders; of one that was drawn again, the last try."""
    return list({folder_of(trial): trial for trial in sorted(study.trials, key=lambda trial: trial.number)}.values())


def finished(study: optuna.Study) -> int:
    """How many trials have ended."""
    return sum(trial.state.is_finished() for trial in trials_of(study))


def _work(sweep: Sweep) -> None:
    while not sweep.stop.is_set():
        with sweep.lock:
            begun = sum(trial.state.name != "WAITING" for trial in trials_of(sweep.study))
            if begun >= sweep.trials:
                return
            trial, draw = _ask(sweep, begun)
        _run_trial(sweep, trial, draw)


def _ask(sweep: Sweep, begun: int) -> tuple[optuna.Trial, dict[str, Any]]:
    """The next trial. Its draw depends on the seed and the trials before it, not on whether the sweep was stopped.

    `begun`: how many trials these are, also those that still run: each trial has a seed of its own.
    """
    import optuna

    settings = sweep.settings
    kinds: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
        "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, settings.trials // 4)),
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "grid": lambda seed: optuna.samplers.RandomSampler(seed=seed),  # all points wait already
    }
    sweep.study.sampler = kinds[settings.sampler](settings.seed + 1000 * begun)
    trial = sweep.study.ask()
    draw = drawn(trial, settings)
    if "folder" not in trial.user_attrs:
        trial.set_user_attr("folder", trial.number)
    return trial, draw


def _run_trial(sweep: Sweep, trial: optuna.Trial, draw: dict[str, Any]) -> None:
    """One trial to its end, whatever that is; the study knows it afterwards, except where the sweep is stopped."""
    from optuna.trial import TrialState

    folder = int(trial.user_attrs["folder"])
    run = RunFolder(sweep.folder / "trials" / f"{folder:04d}")
    values = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in draw.items())
    started, state, result = time.monotonic(), TrialState.FAIL, None
    try:
        config = trial_config(sweep.base, draw, run.path)
        while run.in_use() and not sweep.stop.wait(_POLL_SECONDS):
            pass  # what a killed sweep started still runs: the trial goes on from where it ends
        link_base(RunFolder(sweep.folder / "base"), run, sweep.base)
        ended_early = _run_in_process(sweep, trial, config, run)
        if sweep.stop.is_set():
            return
        state = TrialState.PRUNED if ended_early else TrialState.COMPLETE
        result = None if ended_early else _figures(sweep.settings, run)
        words = "ended early" if ended_early else ", ".join(f"{value:.5g}" for value in result or ())
    except (ConfigError, _TrialError) as error:
        words = f"failed: {error}".splitlines()[0]
        trial.set_user_attr("message", str(error)[:2000])
    trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
    with sweep.lock:
        sweep.study.tell(trial.number, result, state)
        sweep.reporter.say(f"{finished(sweep.study)} of {sweep.trials}: trial {folder}, {values}: {words}")
        _tidy(sweep)


class _TrialError(Exception):
    """A trial that ended with an error of its own."""


def link_base(base: RunFolder, run: RunFolder, config: Config) -> None:
    """Begin a trial's run folder with what the base run made: hard links, or copies on another disk.

    Answers are copied: a trial that asks for others adds to its journal in place.
    """
    if run.config.exists():
        return
    stages = stages_until(SHARED_UNTIL, config)
    artifacts = {artifact.path for stage in stages for artifact in stage.writes}
    for source in (base.path / path for path in sorted(artifacts)):
        files = [item for item in source.rglob("*") if item.is_file()] if source.is_dir() else [source]
        for file in files:
            if file.exists():
                _link(file, run.path / file.relative_to(base.path), copy=file.is_relative_to(base.responses))
    for stage in stages:
        manifest = manifest_path(stage, base)
        if manifest.exists():
            write_text(run.path / manifest.relative_to(base.path), manifest.read_text(encoding="utf-8"))
    write_text(run.config, base.config.read_text(encoding="utf-8"))  # last: it makes a run folder of it


def _link(source: Path, target: Path, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        if not copy:
            os.link(source, target)
            return
    except OSError:  # another disk, or one without hard links
        pass
    shutil.copyfile(source, target)


def _run_in_process(sweep: Sweep, trial: optuna.Trial, config: Config, run: RunFolder) -> bool:
    """Run a trial; whether it was ended early. Raises _TrialError with what its log says."""
    settings, log = run.path.with_suffix(".yaml"), run.path.with_suffix(".log")
    write_text(settings, dump_config(config))
    command = [sys.executable, "-m", "kdscale.cli.main", TRIAL_UNTIL, str(settings), "--accept-changes"]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    seen, early = 0, False
    try:
        while process.poll() is None:
            sweep.stop.wait(_POLL_SECONDS)
            seen, early = _judge(sweep, trial, run, seen)
            if early or sweep.stop.is_set():
                break
    finally:
        _end(process)
    if early or sweep.stop.is_set():
        return early
    if process.returncode:
        raise _TrialError(_last_error(log) or f"exit code {process.returncode}; see {log}")
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have a trial that still runs save and leave; kill it where it does not."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _judge(sweep: Sweep, trial: optuna.Trial, run: RunFolder, seen: int) -> tuple[int, bool]:
    """How many validations have been looked at, and whether the trial is to end: it is not among the best so far."""
    if not sweep.settings.end_early or sweep.settings.size:
        return seen, False
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "validation" and row["step"] and "ce" in row]
    for rung, row in enumerate(rows[seen:], seen):
        with sweep.lock:
            trial.set_user_attr(f"ce_{rung}", row["ce"])
            at_rung = {other.number: other.user_attrs.get(f"ce_{rung}") for other in trials_of(sweep.study)}
            others = [ce for other, ce in at_rung.items() if ce is not None and other != trial.number]
        if len(others) >= _BEST_SHARE and row["ce"] > sorted(others)[(len(others) - 1) // _BEST_SHARE]:
            return rung + 1, not run.student.exists()
    return len(rows), False


def _last_error(log: Path) -> str:
    """The error that ends a log: from its last line that begins with `error:` on."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    begins = [number for number, line in enumerate(lines) if line.startswith("error:")]
    return "\n".join(lines[begins[-1] :]).removeprefix("error:").strip() if begins else ""


def _figures(settings: SweepConfig, run: RunFolder) -> list[float]:
    """What a finished trial is judged by."""
    model = read_json(run.eval / EVAL_FILE)["models"][DISTILLED]
    return [
        float(model["quality"][settings.objective]),
        *([float(model["size"][settings.size])] if settings.size else []),
    ]


def _tidy(sweep: Sweep) -> None:
    """Delete the weights of trials that the setting `keep` does not keep; everything else of them stays."""
    if sweep.settings.keep == "all":
        return
    best = {trial.number for trial in winners(sweep.study)} if sweep.settings.keep == "best" else set()
    for trial in trials_of(sweep.study):
        if trial.state.is_finished() and trial.number not in best:
            run = RunFolder(trial_folder(sweep.folder, trial))
            for artifact in (CHECKPOINTS, STUDENT, PRUNED):
                if run.at(artifact).exists():
                    remove_tree(run.at(artifact))


def winners(study: optuna.Study) -> Sequence[optuna.trial.FrozenTrial]:
    """The best trial, or those of the Pareto front; none before one is finished."""
    from optuna.trial import TrialState

    return study.best_trials if study.get_trials(states=[TrialState.COMPLETE]) else []
