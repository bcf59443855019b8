"""The space of a sweep: what Optuna draws from, and the config that a draw makes of the base config."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdscale.config.load import build_config, find_config, load_config
from kdscale.config.root import Config
from kdscale.config.sweep import Range, SweepConfig
from kdscale.errors import ConfigError, raise_together

if TYPE_CHECKING:
    import optuna

Draw = Mapping[str, Any]

_MOST_POINTS = 100_000  # of a grid


def base_config(sweep: SweepConfig) -> Config:
    """The config that every trial changes, with the sweep's budget. Raises ConfigError.

    Trials make no quantised forms, which no trial is judged by; students have the widths that these ask for.
    """
    base = load_config(find_config(sweep.base))
    tree = base.resolved() | {"prune": base.shaping.model_dump(mode="json"), "quantize": None}
    tree["distill"]["tokens"] = sweep.tokens or tree["distill"]["tokens"]
    tree["eval"] |= {
        "tokens": sweep.eval_tokens or tree["eval"]["tokens"],
        "efficiency": False,
        "prompts": [],
        "draft": None,
    }
    return build_config(tree | {"tracking": {}, "run_dir": str(Path(sweep.folder) / "base")}, sweep.base)


def trial_config(base: Config, draw: Draw, run_dir: Path) -> Config:
    """The config of a trial. Raises ConfigError for a draw that makes none."""
    tree = changed(base.resolved(), draw)
    return build_config({**tree, "run_dir": str(run_dir)}, _in_words(draw))


def changed(tree: dict[str, Any], draw: Draw) -> dict[str, Any]:
    """The tree with other values at dotted fields, in which a number counts the entries of a list from 0."""
    tree = copy.deepcopy(tree)
    for field, value in draw.items():
        *parents, leaf = field.split(".")
        node: Any = tree
        for part in parents:
            node = _entry(node, part, field)
            if not isinstance(node, dict | list):
                raise ConfigError(f"search: {field}", expected="a field of the config", got=f"{part} is a plain value")
        if isinstance(node, list):
            _entry(node, leaf, field)
            node[int(leaf)] = value
        else:
            node[leaf] = value
    return tree


def _entry(node: Any, part: str, field: str) -> Any:
    try:
        return node[int(part)] if isinstance(node, list) else node[part]
    except (KeyError, IndexError, ValueError) as error:
        there = f"entries 0 to {len(node) - 1}" if isinstance(node, list) else f"fields {', '.join(map(str, node))}"
        raise ConfigError(
            f"search: {field}", expected="a field of the config", got=f"no {part!r} among {there}"[:400]
        ) from error


def check_space(sweep: SweepConfig, base: Config) -> None:
    """Raises ConfigError, with all problems, when a value of one field does not go with the base config.

    Values that only some others make wrong are found by their trial, which fails with that message.
    """
    if sweep.sampler == "grid":
        grid_points(sweep)
    errors: list[ConfigError] = []
    for field, choices in sweep.search.items():
        for value in choices.ends if isinstance(choices, Range) else choices:
            try:
                trial_config(base, {field: value}, Path(sweep.folder))
            except ConfigError as error:
                errors.append(error)
                break
    if errors and len(errors) < len(sweep.search):  # a value may be right only beside another field's
        errors = [] if _some_draw_works(sweep, base) and not _missing(errors) else errors
    raise_together(errors)


def _missing(errors: list[ConfigError]) -> bool:
    return any(error.what.startswith("search: ") for error in errors)


def _some_draw_works(sweep: SweepConfig, base: Config) -> bool:
    """Whether each end of each field is in a draw that makes a config, of many random draws."""
    rng, ends = np.random.default_rng(0), _ends(sweep)
    for field, values in ends.items():
        for value in values:
            draws = ({**_random(rng, ends), field: value} for _ in range(64))
            if not any(_works(base, draw, sweep) for draw in draws):
                return False
    return True


def _ends(sweep: SweepConfig) -> dict[str, tuple[Any, ...]]:
    return {field: choices.ends if isinstance(choices, Range) else choices for field, choices in sweep.search.items()}


def _random(rng: np.random.Generator, ends: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {field: values[int(rng.integers(len(values)))] for field, values in ends.items()}


def _works(base: Config, draw: Draw, sweep: SweepConfig) -> bool:
    try:
        trial_config(base, draw, Path(sweep.folder))
    except ConfigError:
        return False
    return True


def drawn(trial: optuna.Trial, sweep: SweepConfig) -> dict[str, Any]:
    """The value of each field that Optuna suggests for this trial."""
    return {field: _suggested(trial, field, choices) for field, choices in sweep.search.items()}


def _suggested(trial: optuna.Trial, field: str, choices: Any) -> Any:
    if not isinstance(choices, Range):
        return trial.suggest_categorical(field, choices)
    if choices.whole:
        step = int(choices.step or 1)
        return trial.suggest_int(field, int(choices.low), int(choices.high), step=step, log=choices.log)
    return trial.suggest_float(field, choices.low, choices.high, step=choices.step, log=choices.log)


def grid_points(sweep: SweepConfig) -> list[dict[str, Any]]:
    """All combinations of values for the grid sampler, shuffled: the first few are not all in one corner.

    Raises ConfigError where they are too many to list.
    """
    if grid_size(sweep) > _MOST_POINTS:
        raise ConfigError(
            "search", expected=f"a grid of at most {_MOST_POINTS:,} points", got=f"{grid_size(sweep):,}",
            hint="name fewer values or a larger step, or take sampler: random",
        )  # fmt: skip
    values = itertools.product(*map(_values, sweep.search.values()))
    points = [dict(zip(sweep.search, point, strict=True)) for point in values]
    random.Random(sweep.seed).shuffle(points)
    return points


def grid_size(sweep: SweepConfig) -> int:
    """How many points these are."""
    return math.prod(map(_count, sweep.search.values()))


def _count(choices: Any) -> int:
    if not isinstance(choices, Range):
        return len(choices)
    assert choices.step is not None, "the config has checked that a grid has steps"
    return int((choices.high - choices.low) / choices.step * (1 + 1e-9)) + 1


def _values(choices: Any) -> Sequence[Any]:
    """Every value of a field."""
    if not isinstance(choices, Range):
        return list(choices)
    assert choices.step is not None
    return [choices.low + number * choices.step for number in range(_count(choices))]


def _in_words(draw: Draw) -> str:
    return ", ".join(f"{field}={value}" for field, value in draw.items())
