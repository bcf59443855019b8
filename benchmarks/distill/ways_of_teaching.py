"""Every way of teaching at the same budget of tokens: what each makes of one pruned student.

    python benchmarks/distill/ways_of_teaching.py --work /tmp/ways --tokens 100000 demo smollm2-135m-to-82m-cached

The first config is the common ground: its pruning, optimiser and evaluation are given to all the others (adapters keep
their own optimiser, as they want a higher rate). It prunes once, and every way goes on from a copy of that run folder;
one whose config has other text, or another teacher, does again what that changes, and is measured on its own held-out
text. A way that is finished is kept, and one that was killed goes on. Times are processor seconds, which other work on
the machine hardly changes. Writes ways.csv into --work and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdscale.config.load import build_config, dump_config, find_config, load_config
from kdscale.config.root import Config
from kdscale.files import read_json, write_json, write_text
from kdscale.pipeline.stage import manifest_path
from kdscale.pipeline.stages.registry import STAGES, stages_of
from kdscale.runs.folder import RunFolder

COMMON = ("importance", "prune", "eval", "seed")
COMMON_OF_DISTILL = ("seq_len", "global_batch", "micro_batch", "dtype", "optimizer", "validate_every")
FIGURES = ("perplexity", "kl_to_teacher", "top1_agreement", "expected_calibration_error")
COLUMNS = ("way", *FIGURES, "processor_seconds_to_prepare", "processor_seconds_to_distil", "bytes_prepared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--tokens", type=int, default=30_000, help="of distillation, for each way")
    parser.add_argument("configs", nargs="+", help="shipped configs or YAML files; the first is the common ground")
    arguments = parser.parse_args()
    base = load_config(find_config(arguments.configs[0]))
    pruned = arguments.work / "pruned"
    kdscale("prune", base, base, pruned, arguments.tokens)
    rows: list[dict[str, Any]] = []
    for name in arguments.configs:
        way = Path(name).stem
        run = RunFolder(arguments.work / way)
        if is_new := not run.path.exists():
            shutil.copytree(pruned, run.path)
        teach(load_config(find_config(name)), base, run, arguments.tokens, accept_changes=is_new)
        rows += [{"way": "before distillation", **quality(run, "pruned")}] * (not rows) + [distilled(way, run)]
        write_csv(arguments.work / "ways.csv", rows)
    print(markdown(rows))


def teach(config: Config, base: Config, run: RunFolder, tokens: int, accept_changes: bool) -> None:
    """Bring a run up to its evaluation, what it prepares and the distillation apart; adds up what each of them took."""
    file = seconds_file(run)
    taken = read_json(file) if file.exists() else {}
    stages = [stage.name for stage in stages_of(config) if stage.only_with or stage.across_job]
    for stage in [*stages, "eval"]:
        before = processor_seconds()
        kdscale(stage, config, base, run.path, tokens, accept_changes)
        taken[stage] = taken.get(stage, 0.0) + processor_seconds() - before
        write_json(file, taken)


def processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_file(run: RunFolder) -> Path:
    """Where the processor seconds of a way's stages are kept, for a way that goes on."""
    return run.path.parent / f"{run.path.name}.seconds.json"


def kdscale(stage: str, config: Config, base: Config, run_dir: Path, tokens: int, accept_changes: bool = False) -> None:
    """Bring a run with the config, and what it must share with the others, up to a stage."""
    settings = run_dir.parent / f"{run_dir.name}.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    write_text(settings, dump_config(with_common_ground(config, base, run_dir, tokens)))
    command = [sys.executable, "-m", "kdscale.cli.main", stage, str(settings)]
    subprocess.run([*command, *(["--accept-changes"] if accept_changes else [])], check=True)


def with_common_ground(config: Config, base: Config, run_dir: Path, tokens: int) -> Config:
    """The config with what it must share with the others."""
    tree, common = config.resolved(), base.resolved()
    tree |= {section: common[section] for section in COMMON}
    shared = set(COMMON_OF_DISTILL) - ({"optimizer"} if config.distill.lora is not None else set())
    tree["distill"] |= {field: common["distill"][field] for field in shared} | {"tokens": tokens}
    return build_config({**tree, "run_dir": str(run_dir)}, str(run_dir))


def distilled(way: str, run: RunFolder) -> dict[str, Any]:
    """The row of one way: quality, and what it took."""
    prepared = [stage for stage in STAGES.values() if stage.only_with and manifest_path(stage, run).exists()]
    folders = [run.at(artifact) for stage in prepared for artifact in stage.writes]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    taken = read_json(seconds_file(run))
    return {
        "way": way,
        **quality(run, "distilled"),
        "processor_seconds_to_prepare": sum(taken[stage.name] for stage in prepared),
        "processor_seconds_to_distil": taken["distill"],
        "bytes_prepared": sum(file.stat().st_size for file in files),
    }


def quality(run: RunFolder, model: str) -> dict[str, float]:
    """The figures of one model on held-out text."""
    measured = read_json(run.eval / "eval.json")["models"][model]["quality"]
    return {figure: measured[figure] for figure in FIGURES}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows; what a way does not have stays empty."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    lines = ["| " + " | ".join(COLUMNS).replace("_", " ") + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [
            f"{value:,.3f}" if isinstance(value, float) else str(value) for value in (row.get(c, "") for c in COLUMNS)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
