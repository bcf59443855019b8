"""The cells of the bench: a teacher, a shape, a method, a seed and a budget of tokens, each a JSON file once measured.

A cell carries the commit, the settings it was made with and the digest of the pruned weights that it began from. It is
stale when today's settings differ from those, and so is one whose start is not that of the curve's cell at 0 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdscale.config.load import build_config, config_differences
from kdscale.config.root import Config
from kdscale.files import read_json, write_text

SHAPES = ("ffn", "ffn_heads", "hidden", "layers", "mixed")
BUDGETS = (0, 30_000, 100_000, 300_000, 1_000_000)
TEACHERS_FILE = Path(__file__).with_name("teachers.json")

# What differs from a config that says nothing but the shape, the text and the size of a step. Minitron (arXiv
# 2407.14679, 2408.11796): units by the size of their activations, layers by block influence, what is kept is copied
# as it is; then forward KL on the logits alone, over the whole vocabulary, at temperature 1.
METHODS: dict[str, dict[str, Any]] = {
    "ours": {},
    "minitron": {
        "prune": {
            "ffn_method": "activation",
            "head_method": "activation",
            "hidden_method": "activation",
            "layer_method": "block_influence",
            "contiguous_layers": False,
            "layer_repair": "none",
            "compensate": "none",
        },
        "distill": {
            "objectives": [
                {
                    "name": "token_divergence",
                    "targets": "full",
                    "divergence": "forward_kl",
                    "ce_weight": 0.0,
                    "temperature": 1.0,
                }
            ]
        },
    },
}

# Of the resolved config: what a cell carries. `distill` only where anything is distilled.
_KEPT = {
    "importance": ("calibration_tokens", "layer_tokens", "seq_len", "dtype"),
    "prune": None,  # all of it
    "distill": ("tokens", "seq_len", "global_batch", "optimizer", "objectives", "dtype"),
}
# Not of prune: what says nothing of these students. Mixers and heads that predict ahead are in none of the teachers.
_LEFT_OUT = ("search", "max_shard_bytes", "tolerance", "axes", "count", "ssm_method", "keep_mtp")


@dataclass(frozen=True, order=True)
class Cell:
    """One student: `tokens` of distillation after pruning with `method` to `shape`."""

    teacher: str
    shape: str
    method: str
    seed: int
    tokens: int

    @property
    def name(self) -> str:
        """Of its file and folders: `smollm2-135m.ffn.ours.s1.30000`."""
        return f"{self.start_name}.{self.tokens}"

    @property
    def start_name(self) -> str:
        """What the cells of all budgets share."""
        return f"{self.teacher}.{self.shape}.{self.method}.s{self.seed}"

    @property
    def start(self) -> Cell:
        """The same before any distillation."""
        return replace(self, tokens=0)

    def file(self, results: Path) -> Path:
        """Where its figures are."""
        return results / f"{self.name}.json"


@dataclass(frozen=True)
class Setup:
    """What teachers.json says of a teacher."""

    shapes: Mapping[str, Mapping[str, int]]
    distill: Mapping[str, Any]
    seconds_to_prune: float
    tokens_per_second: float
    importance: Mapping[str, Any] = field(default_factory=dict)  # settings, where not the defaults

    def seconds(self, cell: Cell) -> float:
        """Roughly how long a cell takes on one core."""
        return self.seconds_to_prune + cell.tokens / self.tokens_per_second


def read_setups(path: Path = TEACHERS_FILE) -> dict[str, Setup]:
    """By the names of the teachers."""
    return {name: Setup(**row) for name, row in read_json(path).items()}


def config_of(
    cell: Cell, setup: Setup, teacher: Path | str, text: Path | str, run_dir: Path | str, threads: int | None = None
) -> Config:
    """The config of a run that makes the cell."""
    method = METHODS[cell.method]
    steps = cell.tokens // (setup.distill["seq_len"] * setup.distill["global_batch"])
    optimizer = {**setup.distill["optimizer"], "warmup_steps": max(1, min(8, steps // 10))}
    distill = {
        **setup.distill, "optimizer": optimizer, "validate_every": 1000, "checkpoint_every": 100, "keep_checkpoints": 1,
        **method.get("distill", {}),
    }  # fmt: skip
    if cell.tokens:
        distill["tokens"] = cell.tokens
    tree = {
        "name": cell.name,
        "run_dir": str(run_dir),
        "seed": cell.seed,
        "teacher": {"path": str(teacher)},
        "data": {"sources": [{"path": str(text)}]},
        "importance": dict(setup.importance),
        "prune": {**setup.shapes[cell.shape], **method.get("prune", {})},
        "distill": distill,
        "runtime": {"threads": threads},
    }
    return build_config(tree, cell.name)


def settings(cell: Cell, config: Config) -> dict[str, Any]:
    """What of the resolved config a cell carries."""
    plain = config.resolved()
    kept = {
        section: {name: value for name, value in plain[section].items() if names is None or name in names}
        for section, names in _KEPT.items()
        if section in plain and (section != "distill" or cell.tokens)
    }
    for name in _LEFT_OUT:
        kept["prune"].pop(name, None)
    return json.loads(json.dumps(kept))  # as it is read back: no tuples


def settings_today(cell: Cell, setup: Setup) -> dict[str, Any]:
    """What a cell that is made today would carry."""
    return settings(cell, config_of(cell, setup, "teacher", "text.jsonl", "run"))


def changed(cell: Cell, figures: Mapping[str, Any], setup: Setup) -> list[str]:
    """The settings in which a measured cell differs from one that is made today.

    A setting that is newer than the cell counts for `ours`, which is whatever the defaults are; every setting of the
    other method is written down above.
    """
    differences = config_differences(figures["settings"], settings_today(cell, setup))
    return [str(one) for one in differences if cell.method == "ours" or one.old is not None]


def read_cells(results: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """All that is measured, in the order of its names."""
    for path in sorted(results.glob("*.json")):
        figures = read_json(path)
        if {"shape", "tokens"} <= set(figures):
            yield Cell(*(figures[name] for name in ("teacher", "shape", "method", "seed", "tokens"))), figures


def write_cell(path: Path, figures: Mapping[str, Any]) -> None:
    """One JSON file, a section a line; complete or not there."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in figures.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def stale(cells: Sequence[tuple[Cell, Mapping[str, Any]]], setups: Mapping[str, Setup]) -> dict[str, str]:
    """Why measured cells do not belong to today's curves, by their names; those that do are not in it."""
    why: dict[str, str] = {}
    starts = {cell: figures["start"] for cell, figures in cells if not cell.tokens}
    for cell, figures in cells:
        if cell.teacher not in setups or cell.shape not in setups[cell.teacher].shapes or cell.method not in METHODS:
            why[cell.name] = "the bench has no such teacher, shape or method any more"
        elif differences := changed(cell, figures, setups[cell.teacher]):
            why[cell.name] = "; ".join(differences)
        elif starts.get(cell.start, figures["start"]) != figures["start"]:
            why[cell.name] = "it began from other pruned weights than the cell at 0 tokens"
    return why
