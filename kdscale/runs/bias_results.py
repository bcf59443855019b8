"""What bias.json says, for those who show it or let it decide; the bias stage writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, model_validator

from kdscale.errors import RunFolderError
from kdscale.files import read_json
from kdscale.runs.folder import BIAS_FILE, fits
from kdscale.runs.models import CORRECTED, PRUNED, TEACHER


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class Value(_Record):
    """A figure of one model and its standard error; None where it cannot be computed."""

    value: float | None
    error: float | None


class Growth(_Record):
    """How a figure changed from the teacher; without a verdict where it has no ideal or could not be computed."""

    change: float | None
    error: float | None
    growth: float | None = None
    growth_error: float | None = None
    smallest: float | None = None
    verdict: str | None = None


class Change(_Record):
    """From the teacher to one model: each figure, and how many items flipped to the decision and back."""

    figures: dict[str, Growth]
    flips: dict[str, int]


class Part(_Record):
    """Of all items or one group: figures by model, changes by model."""

    items: int
    clusters: int
    figures: dict[str, dict[str, Value]]
    changes: dict[str, Change]


class FigureWords(_Record):
    """A figure's title, its value without bias, and the range of its values."""

    title: str
    ideal: float | None
    range: float


class MeasureResults(_Record):
    """One entry of bias.measures, of the kind `measure`; `headline` names the figure with the verdicts."""

    measure: str
    title: str
    paper: str
    decision: str
    headline: str
    note: str = ""
    figures: dict[str, FigureWords]
    verdicts: dict[str, str]
    all: Part
    groups: dict[str, Part]

    def verdict_of(self, model: str) -> str:
        """`grew`, `kept`, `fell` or `not measurable`."""
        return self.all.changes[model].figures[self.headline].verdict or "not measurable"


class Results(_Record):
    """bias.json. Every part has all figures of all models, the teacher first, and the changes of all others."""

    schema_version: int
    settings: dict[str, str | int | float | None] = {}
    models: list[str]
    measures: dict[str, MeasureResults]

    @model_validator(mode="after")
    def _has_all_that_is_shown(self) -> Results:
        if self.models[:1] != [TEACHER]:
            raise ValueError("expected the teacher first")
        for measure in self.measures.values():
            if measure.headline not in measure.figures:
                raise ValueError("expected a figure with the verdicts")
            parts = (measure.all, *measure.groups.values())
            if not all(_is_whole(part, self.models, set(measure.figures)) for part in parts):
                raise ValueError("expected every figure of every model")
        return self


def _is_whole(part: Part, models: list[str], figures: set[str]) -> bool:
    changes = [part.changes.get(name) for name in models[1:]]
    return all(figures <= part.figures.get(name, {}).keys() for name in models) and all(
        change is not None and figures <= change.figures.keys() and {"to", "back"} <= change.flips.keys()
        for change in changes
    )


def read_bias(folder: Path) -> Results | None:
    """The results in a run's folder `bias`, None where there are none. Raises RunFolderError for a damaged file."""
    path = folder / BIAS_FILE
    if not path.exists():
        return None
    tree = read_json(path, RunFolderError, expect=dict)
    if not fits(Results)(tree):
        raise RunFolderError(f"{path} is damaged", hint="kdscale bias CONFIG makes it again")
    return Results.model_validate(tree)


class HasRange(Protocol):
    """A figure, as a measure defines it or as bias.json names it."""

    @property
    def range(self) -> float:
        """Of its values: 1 for a share, 100 for a percentage."""


def written(value: float, figure: HasRange, sign: Literal["", "+"] = "") -> str:
    """A value of a figure as text: a share to three digits, a percentage to one; a change with its sign."""
    return format(value, f"{sign}.{1 if figure.range > 1 else 3}f").replace("-", "−")


def results_of_run(models: list[str]) -> list[str]:
    """Of a run's models those that it hands on: the distilled student, and its forms with fewer bits."""
    return [name for name in models if name not in (TEACHER, CORRECTED, PRUNED)]


@dataclass(frozen=True)
class TooMuch:
    """A figure of a model that grew more than the config allows."""

    key: str  # in bias.fail_if
    model: str
    growth: float
    limit: float
    title: str

    def __str__(self) -> str:
        return f"{self.key}, {self.model}: grew by {self.growth:.3g}, more than {self.limit:g} ({self.title})"


def grown_too_much(results: Results, fail_if: Mapping[str, float]) -> list[TooMuch]:
    """What of bias.fail_if is exceeded by what the run hands on: the growth itself counts, whatever its error."""
    found = []
    for key, limit in fail_if.items():
        if (limited := _limited(results, key)) is None:
            continue
        measure, figure, changes = limited
        for model, change in changes.items():
            if change.growth is not None and change.growth > limit:
                found.append(TooMuch(key, model, change.growth, limit, measure.figures[figure].title))
    return found


def unseen_limits(results: Results, fail_if: Mapping[str, float]) -> list[str]:
    """Sentences on limits that are smaller than what the items can show, and on those that nothing is held to."""
    out = []
    for key, limit in fail_if.items():
        if (limited := _limited(results, key)) is None:
            out.append(f"bias.fail_if: {key} is no figure of these results")
            continue
        measure, _, changes = limited
        smallest = max((one.smallest for one in changes.values() if one.smallest is not None), default=None)
        if smallest is not None and smallest > limit:
            out.append(
                f"bias.fail_if: {key} allows {limit:g}, but {measure.all.clusters:,} independent items show a growth "
                f"only from {smallest:.3g} on: chance decides"
            )
        if unknown := [model for model, one in changes.items() if one.growth is None]:
            out.append(f"bias.fail_if: {key} cannot be computed for {', '.join(unknown)} from these items")
    return out


def _limited(results: Results, key: str) -> tuple[MeasureResults, str, dict[str, Growth]] | None:
    """The measure and figure that a key of bias.fail_if means, and its change in each model that the run hands on.

    None where the results have no such figure: bias.fail_if may change after they were made.
    """
    name, _, figure = key.partition(".")
    measure = results.measures.get(name)
    if measure is None or (figure and figure not in measure.figures):
        return None
    figure = figure or measure.headline
    return (
        measure,
        figure,
        {model: measure.all.changes[model].figures[figure] for model in results_of_run(results.models)},
    )
