"""Break a run over two hosts of this machine in every way, at random moments, and measure what it loses.

    python benchmarks/faults/faults.py --work /tmp/faults --injections 200 --out faults.jsonl
    python benchmarks/faults/faults.py --summary faults.jsonl  # the table; also while it runs

A tiny model trains on two ranks over gloo with ZeRO-3. Each rank has an agent of its own, reached by a stand-in for ssh
that stays on this machine. Each run starts from an empty folder and is broken several times; every injection and every
finished run is one line of the output file. A run is right when its student has the bytes, and its metrics log the
steps and losses, of the unbroken run. faults_breaker.py lists the faults. A condition holds for a whole run: a slow
disk (each fsync takes 0.2 s longer), a clock that is hours or a year ahead on one rank (as Python reads it), a small
disk that is filled to the last byte (needs root, for a tmpfs), or a node that never comes back (the run must equal the
unbroken one within rounding: one rank sums in another order than two).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import faults_table
from faults_breaker import FAULTS, Breaker, Stuck
from faults_job import EVERY, FaultyJob, equal_within_rounding, prepare, signal_all, with_condition
from two_hosts import tiny_config

CONDITIONS = {"": 6, "slow disk": 1, "clock skew": 1, "small disk": 1, "one node left": 1}  # how often each is chosen
ONE_LEFT = ("--min-nodes", "1", "--host-timeout", "10")


def broken_run(number: int, arguments: argparse.Namespace, config: Path, unbroken: FaultyJob, startup: float) -> int:
    """Break one run several times and compare its student; returns the number of injections."""
    work, rng = Path(arguments.work), random.Random(f"{arguments.seed}-{number}")
    condition = rng.choices(list(CONDITIONS), list(CONDITIONS.values()))[0]
    if arguments.condition is not None:
        condition = arguments.condition
    weights = {name: fault.weight for name, fault in FAULTS.items()}
    faults = dict.fromkeys(arguments.faults, 1) if arguments.faults else weights
    if condition == "small disk":
        faults = {"disk full": 3, "kill -9 of a rank": 1}
    one_left = condition == "one node left"
    if one_left:
        faults = {"node gone for good": 1}
    injections = 0

    def note(**record: Any) -> None:
        line = {"time": time.time(), "seed": arguments.seed, "run": number, **record}
        with Path(arguments.out).open("a") as out:
            out.write(json.dumps(line) + "\n")

    with with_condition(work, condition, rng) as folder:
        run = folder / f"run-{arguments.seed}-{number}"
        job = FaultyJob(work, config, run, arguments.watchdog, ONE_LEFT if one_left else ())
        breaker = Breaker(job, condition, rng, startup, note)
        try:
            for _ in range(1 if one_left else rng.randint(6, 12)):
                fault = rng.choices(list(faults), list(faults.values()))[0]
                if not breaker.moment(FAULTS[fault].late):
                    break
                breaker.inject(fault)
                injections += 1
            finish(breaker)
            if one_left:
                same = equal_within_rounding(job, unbroken)
            else:
                same = job.student() == unbroken.student() and job.curve() == unbroken.curve()
            note(kind="run", condition=condition, injections=injections, same=same)
        except Stuck as problem:
            for record in breaker.pending:
                note(**record, lost=None, kept=False)
            note(kind="run", condition=condition, injections=injections, same=False, stuck=str(problem))
            same = False
        finally:
            tree = job.tree()
            job.process.kill()
            signal_all(tree, signal.SIGKILL)
            (work / "away-two").unlink(missing_ok=True)
        if same:
            shutil.rmtree(job.run)
            job.log.unlink()
    return injections


def finish(breaker: Breaker) -> None:
    """Run to the end without more faults; a job that ended (the disk was full, no restart was left) starts again."""
    for _ in range(3):
        breaker.until(lambda: False, 1800)
        breaker.read()
        if breaker.job.process.returncode == 0:
            if breaker.pending:  # it went on without a checkpoint
                breaker.settle(0 if breaker.job.reached <= EVERY else breaker.job.reached)
            return
        breaker.job.start()
    raise Stuck(f"ended with {breaker.job.process.returncode} without a fault")


def main() -> int:
    arguments = parse()
    if arguments.summary:
        return faults_table.show(Path(arguments.summary))
    work = Path(arguments.work)
    work.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # nothing is left running
    prepare(work)
    config = tiny_config(work)
    began = time.monotonic()
    unbroken = FaultyJob(work, config, work / "unbroken", arguments.watchdog)
    while unbroken.step() == 0 and unbroken.process.poll() is None:
        time.sleep(0.05)
    startup = time.monotonic() - began
    if code := unbroken.process.wait():
        raise SystemExit(f"the unbroken run left with {code}; see {unbroken.log}")
    print(f"unbroken run: {startup:.0f} s to the first step, {time.monotonic() - began:.0f} s in all", flush=True)
    injections = number = 0
    while injections < arguments.injections:
        injections += broken_run(number, arguments, config, unbroken, startup)
        number += 1
        print(f"{injections} injections in {number} runs, {(time.monotonic() - began) / 60:.0f} min", flush=True)
    return faults_table.show(Path(arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="a folder that does not exist yet", default="faults")
    parser.add_argument("--out", default="faults.jsonl", help="one JSON object a line, appended")
    parser.add_argument("--injections", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--watchdog", type=float, default=20.0, help="distill.watchdog_seconds; more where CPUs are shared"
    )
    parser.add_argument("--faults", nargs="*", choices=sorted(FAULTS), help="only these")
    parser.add_argument("--condition", choices=sorted(CONDITIONS), help="only this")
    parser.add_argument("--summary", metavar="FILE", help="print the table of an output file, run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
