"""Every way of teaching at the same budget of tokens: what each makes of one pruned student.

    python benchmarks/distill/ways_of_teaching.py --work /tmp/ways --tokens 30000 demo cached-targets match-features

The first config is the common ground: its teacher, text, pruning, optimiser and evaluation are given to all the others.
What is pruned once is copied into each run folder, so that all begin alike; a way whose config brings text of its own
prunes for itself. A way that is finished is kept, and one that was killed goes on. Writes ways.csv into --work and
prints the table. The teacher's folder is the one that the first config names, relative to where this is started.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdscale.config.load import build_config, dump_config, find_config, load_config
from kdscale.config.root import Config
from kdscale.files import read_json, write_text
from kdscale.pipeline.stage import manifest_path
from kdscale.pipeline.stages.registry import STAGES
from kdscale.runs.folder import RunFolder

COMMON = ("importance", "prune", "eval", "seed")
COMMON_OF_DISTILL = ("seq_len", "global_batch", "micro_batch", "dtype", "optimizer", "validate_every")
FIGURES = ("perplexity", "kl_to_teacher", "top1_agreement", "expected_calibration_error")
COLUMNS = ("way", *FIGURES, "seconds_to_prepare", "seconds_to_distil", "bytes_prepared")
PRUNED = "prune"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--tokens", type=int, default=30_000, help="of distillation, for each way")
    parser.add_argument("configs", nargs="+", help="shipped configs or YAML files; the first is the common ground")
    arguments = parser.parse_args()
    base, rows = load_config(find_config(arguments.configs[0])), []
    first: RunFolder | None = None
    for name in arguments.configs:
        config = with_common_ground(load_config(find_config(name)), base, arguments.work / Path(name).stem)
        run = RunFolder(Path(config.run_dir))
        if first is not None and not run.path.exists():
            copy_pruned(first, run)
        settings = arguments.work / f"{Path(name).stem}.yaml"
        write_text(settings, dump_config(config))
        command = [
            sys.executable,
            "-m",
            "kdscale.cli.main",
            "eval",
            str(settings),
            f"--set=distill.tokens={arguments.tokens}",
        ]
        subprocess.run(command, check=True)
        first = first or run
        rows += [pruned(run)] * (not rows) + [distilled(Path(name).stem, run)]
        write_csv(arguments.work / "ways.csv", rows)
    print(markdown(rows))


def with_common_ground(config: Config, base: Config, run_dir: Path) -> Config:
    """The config with what it must share with the others."""
    tree, common = config.resolved(), base.resolved()
    tree |= {section: common[section] for section in COMMON}
    tree["distill"] |= {field: common["distill"][field] for field in COMMON_OF_DISTILL}
    return build_config({**tree, "run_dir": str(run_dir)}, str(run_dir))


def copy_pruned(source: RunFolder, target: RunFolder) -> None:
    """Copy what the stages up to pruning left, with their manifests."""
    names = list(STAGES)
    for stage in [STAGES[name] for name in names[: names.index(PRUNED) + 1]]:
        for path in [*(source.at(artifact) for artifact in stage.writes), manifest_path(stage, source)]:
            copy = target.path / path.relative_to(source.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, copy)
            elif path.exists():
                shutil.copy2(path, copy)


def pruned(run: RunFolder) -> dict[str, Any]:
    """The row of the student that all ways begin with."""
    return {"way": "before distillation", **quality(run, "pruned")}


def distilled(way: str, run: RunFolder) -> dict[str, Any]:
    """The row of one way: quality, and what it took."""
    after_pruning = list(STAGES)[list(STAGES).index(PRUNED) + 1 :]
    prepared = [
        STAGES[name] for name in after_pruning if STAGES[name].only_with and manifest_path(STAGES[name], run).exists()
    ]
    files = [
        file
        for stage in prepared
        for artifact in stage.writes
        for file in run.at(artifact).rglob("*")
        if file.is_file()
    ]
    return {
        "way": way,
        **quality(run, "distilled"),
        "seconds_to_prepare": sum(seconds(stage.name, run) for stage in prepared),
        "seconds_to_distil": seconds("distill", run),
        "bytes_prepared": sum(file.stat().st_size for file in files),
    }


def quality(run: RunFolder, model: str) -> dict[str, float]:
    """The figures of one model on held-out text."""
    measured = read_json(run.eval / "eval.json")["models"][model]["quality"]
    return {figure: measured[figure] for figure in FIGURES}


def seconds(stage: str, run: RunFolder) -> float:
    """How long a finished stage took."""
    return float(read_json(manifest_path(STAGES[stage], run))["seconds"])


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
