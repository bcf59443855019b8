"""Quality after a budget of tokens, ours beside the Minitron recipe: measures every cell that is not measured yet.

    python benchmarks/quality/run.py --work /tmp/quality --corpus CORPUS --budgets 0 30000 \\
        --teachers smollm2-135m=teachers/smollm2-135m-instruct gemma3-270m=teachers/gemma3-270m

A cell is a teacher, a shape, a method, a seed and a budget (cells.py; sizes and steps are in teachers.json). Its
student is made by `kdscale` itself, as a user's would be; each budget is a distillation of its own, with a schedule of
its own, from a copy of the pruned run. Then perplexity, KL and agreement are measured on held-out text of kinds that
were trained on and of others (texts.py), and accuracy on the tasks that come with kdscale.

Every cell is one JSON file in --results, there once it is complete. A cell that is there is left alone, unless the
settings of today are not those that it was made with, or --redo names its method and the code is another. What was
stopped goes on where it was: the run folders are in --work. --limit-minutes stops in good order, also in the middle of
a distillation, with exit status 75. --list says what there is to do and does nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from cells import BUDGETS, METHODS, SHAPES, TEACHERS_FILE, Cell, Setup, changed, config_of, read_setups, settings

from cells import write_cell  # isort: skip
from making import Clock, Making, StageFailedError, TimeIsUpError, commit, digest
from texts import OTHER, Texts, Yardstick, load

from kdscale.config.root import Config
from kdscale.eval.downstream.harness import ScoreSettings, score
from kdscale.eval.downstream.measure import MEAN, means
from kdscale.eval.sizes import model_sizes
from kdscale.files import read_json
from kdscale.models.loading import load_tokenizer
from kdscale.runtime.device import release_memory, set_threads

CHARS_OF_A_KIND = 700_000  # of training text, so that no kind outweighs the others; about 2M tokens in all
STOPPED = 75
_RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality"


@dataclass
class Bench:
    """What all cells of a call share."""

    arguments: argparse.Namespace
    setups: Mapping[str, Setup]
    teachers: Mapping[str, Path]
    until: float
    _texts: dict[tuple[str, int], Texts] = field(default_factory=dict)

    def texts(self, teacher: str, seed: int) -> Texts:
        """Of a teacher's tokenizer and a seed; of which the calibration part is not used: the run draws its own."""
        given = self.arguments
        if (teacher, seed) not in self._texts:
            self._texts[teacher, seed] = Texts.read(
                given.corpus, self.teachers[teacher], seed=seed, other=given.other, known_rows=given.rows,
                other_rows=2 * given.rows, calibration_tokens=given.seq_len, seq_len=given.seq_len,
            )  # fmt: skip
        return self._texts[teacher, seed]

    def yardstick(self, teacher: str, seed: int) -> Yardstick:
        """The teacher on the held-out text; it runs once for each seed."""
        file = self.arguments.work / "teachers" / f"{teacher}.s{seed}.safetensors"
        return Yardstick.read(self.teachers[teacher], self.texts(teacher, seed), file)

    def config(self, cell: Cell, run_dir: Path) -> Config:
        """Of the run that makes a cell; the training text is the same for all teachers."""
        text = self.arguments.work / f"train.s{cell.seed}.jsonl"
        if not text.exists():
            self.texts(cell.teacher, cell.seed).write_training(text, chars=CHARS_OF_A_KIND)
        return config_of(
            cell, self.setups[cell.teacher], self.teachers[cell.teacher].resolve(), text.resolve(), run_dir.resolve(),
            self.arguments.threads,
        )  # fmt: skip

    def making(self, name: str) -> Making:
        """The run folder of this name."""
        return Making(self.arguments.work / "runs" / name, self.until)

    def accuracy(self, model: Any, teacher: str, seed: int) -> dict[str, Any]:
        """On tasks, by default those that come with kdscale: mean and standard error over them, and each one's mean."""
        tokenizer = load_tokenizer(self.teachers[teacher])
        given = self.arguments
        scores = score(model, tokenizer, given.tasks, ScoreSettings(given.items, 16, None, seed))
        measured = means(scores)
        of_tasks = {name.removeprefix("builtin:"): row["value"] for name, row in measured["tasks"].items()}
        return {**measured[MEAN], "items": sum(len(task.ids) for task in scores.values()), "tasks": of_tasks}


def main() -> None:
    arguments = parse()
    setups = read_setups(arguments.sizes)
    teachers = {name: Path(folder) for name, _, folder in (item.partition("=") for item in arguments.teachers)}
    if unknown := [name for name in teachers if name not in setups]:
        raise SystemExit(f"{arguments.sizes} has no {', '.join(unknown)}; it has {', '.join(setups)}")
    cells = [
        Cell(teacher, shape, method, seed, tokens)
        for teacher in teachers for shape in arguments.shapes for method in arguments.methods
        for seed in arguments.seeds for tokens in arguments.budgets
    ]  # fmt: skip
    cells.sort(key=lambda cell: (setups[cell.teacher].seconds(cell), cell.seed, SHAPES.index(cell.shape), cell))
    until = time.monotonic() + 60 * arguments.limit_minutes
    bench = Bench(arguments, setups, teachers, until)
    if arguments.list:
        show_list(bench, cells)
        return
    signal.signal(signal.SIGTERM, stop)
    os.environ["KDSCALE_CACHE"] = str((arguments.work / "cache").resolve())
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    set_threads(arguments.threads)
    failed = []
    try:
        for teacher in teachers:
            for seed in arguments.seeds:
                measure_teacher(bench, teacher, seed)
        for cell in cells:
            if why := to_do(bench, cell):
                say(f"{cell.name}: {why}")
                check_time(bench)
                try:
                    make(bench, cell)
                except StageFailedError as error:
                    failed.append(f"failed: {error}")
                    say(failed[-1])
    except TimeIsUpError:
        say(f"{arguments.limit_minutes:g} minutes are up; the same command goes on")
        sys.exit(STOPPED)
    sys.exit("\n".join(failed) if failed else 0)


def stop(*_: object) -> None:
    """End in good order, once: what stops a job may send its signal to the job and to its children."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def check_time(bench: Bench) -> None:
    """Raises TimeIsUpError at the limit of this call."""
    if time.monotonic() >= bench.until:
        raise TimeIsUpError


def to_do(bench: Bench, cell: Cell) -> str:
    """Why a cell has to be measured; empty where it need not be."""
    path, first = (one.file(bench.arguments.results) for one in (cell, cell.start))
    if not path.exists():
        return "not measured yet"
    figures = read_json(path)
    if differences := changed(cell, figures, bench.setups[cell.teacher]):
        return f"again: {'; '.join(differences)}"
    if first.exists() and read_json(first)["start"] != figures["start"]:
        return "again: the cell at 0 tokens has other weights now"
    if cell.method in bench.arguments.redo and figures["commit"] != commit():
        return f"again: it was made at {figures['commit']}"
    return ""


def measure_teacher(bench: Bench, teacher: str, seed: int) -> None:
    """What the ratios are over, and the teacher's own accuracy."""
    path = bench.arguments.results / f"{teacher}.teacher.s{seed}.json"
    if path.exists():
        return
    check_time(bench)
    perplexity = bench.yardstick(teacher, seed).teacher_perplexity()
    model = load(bench.teachers[teacher])
    figures = {
        "teacher": teacher, "seed": seed, "commit": commit(), "date": today(),
        **{name: {"perplexity": round(value, 4)} for name, value in perplexity.items()},
        "accuracy": bench.accuracy(model, teacher, seed), "size": size_of(model, bench.teachers[teacher]),
    }  # fmt: skip
    write_cell(path, figures)
    say(f"{teacher}, seed {seed}: perplexity {perplexity}")


def make(bench: Bench, cell: Cell) -> None:
    """Make a cell's student, measure it and write the cell. Its own run folder goes; the pruned one stays."""
    check_time(bench)
    making = start = pruned_run(bench, cell.start)
    weights = digest(start.run.pruned)
    if cell.tokens:
        making = bench.making(cell.name)
        config = bench.config(cell, making.run.path)
        stamp = {"settings": settings(cell, config), "start": weights}
        if any(making.stamp.get(name) != value for name, value in stamp.items()):
            making.begin(stamp, copy_of=start.run)
        making.bring_to("distill", config)
    clock, student = Clock(), making.run.student if cell.tokens else start.run.pruned
    model = load(student)
    measured = bench.yardstick(cell.teacher, cell.seed).measure(model)
    right, size = bench.accuracy(model, cell.teacher, cell.seed), size_of(model, student)
    del model
    release_memory()
    figures = {
        "teacher": cell.teacher, "shape": cell.shape, "method": cell.method, "seed": cell.seed, "tokens": cell.tokens,
        "commit": commit(), "date": today(), "threads": bench.arguments.threads, "start": weights,
        **{name: {key: round(value, 5) for key, value in row.items()} for name, row in measured.items()},
        "accuracy": right, "size": size,
        "seconds": {**start.stamp["seconds"], **making.stamp["seconds"], "measure": clock.taken()},
        "settings": settings(cell, bench.config(cell, making.run.path)),
    }  # fmt: skip
    write_cell(cell.file(bench.arguments.results), figures)
    for name, row in measured.items():
        say(
            f"  {name}: perplexity {row['perplexity']:.2f}, {row['ratio']:.3f} times the teacher's, "
            f"KL {row['kl']:.3f}, agreement {row['agreement']:.1%}"
        )
    if cell.tokens and not bench.arguments.keep:
        making.remove()


def pruned_run(bench: Bench, cell: Cell) -> Making:
    """The run up to the pruned student, which all budgets share.

    It is begun anew where it is not of today's settings, and where the call is to redo the method with today's code.
    """
    making = bench.making(cell.start_name)
    config = bench.config(cell, making.run.path)
    stamp = {"settings": settings(cell, config), "commit": commit()}
    matters = ("settings", "commit") if cell.method in bench.arguments.redo else ("settings",)
    if any(making.stamp.get(name) != stamp[name] for name in matters):
        making.begin(stamp)
    making.bring_to("prune", config)
    return making


def size_of(model: Any, folder: Path) -> dict[str, int]:
    """Parameters, and bytes on disk: a head that is no longer tied costs both."""
    sizes = model_sizes(model, folder)
    return {name: sizes[name] for name in ("parameters", "non_embedding_parameters", "weight_bytes")}


def show_list(bench: Bench, cells: list[Cell]) -> None:
    """Every cell with its state, and about how long those take that are still to be made."""
    total = 0.0
    for cell in cells:
        why = to_do(bench, cell)
        seconds = bench.setups[cell.teacher].seconds(cell) if why else 0.0
        total += seconds
        print(f"{cell.name:44} {why or 'done'}{f', about {seconds / 60:.0f} min' if why else ''}")
    print(f"about {total / 3600:.1f} hours on one core are left")


@cache
def _began() -> float:
    return time.monotonic()


def say(line: str) -> None:
    """One line, with the minutes since the first."""
    print(f"[{(time.monotonic() - _began()) / 60:5.1f} min] {line}", flush=True)


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for run folders and what is kept of teachers")
    parser.add_argument("--corpus", type=Path, required=True, help=".jsonl or .jsonl.gz of documents with a source")
    parser.add_argument("--teachers", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), help="tokens of distillation")
    parser.add_argument("--redo", nargs="*", choices=list(METHODS), default=[], help="do again what has another commit")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"), help="then stop, in good order")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="folder of the cells")
    parser.add_argument("--sizes", type=Path, default=TEACHERS_FILE, help="shapes and steps of each teacher")
    parser.add_argument("--other", nargs="+", default=list(OTHER), help="kinds of text that no student sees")
    parser.add_argument("--rows", type=int, default=1, help="held-out sequences of each kind; twice as many of others")
    parser.add_argument("--seq-len", type=int, default=512, help="of held-out sequences")
    parser.add_argument("--tasks", nargs="+", default=["builtin"], help="as eval.downstream.tasks takes them")
    parser.add_argument("--items", type=int, default=48, help="of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the run folders of finished cells")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and do nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
