"""What bias.json says, for those who show it or let it decide; the bias stage writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kdscale.errors import RunFolderError
from kdscale.files import read_json
from kdscale.runs.folder import fits
from kdscale.runs.models import CORRECTED, PRUNED, TEACHER

FILE = "bias.json"  # in the stage's folder


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
    """bias.json."""

    schema_version: int
    models: list[str]
    measures: dict[str, MeasureResults]


def read_bias(folder: Path) -> Results | None:
    """The results in a run's folder `bias`, None where there are none. Raises RunFolderError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    tree = read_json(path, RunFolderError, expect=dict)
    if not fits(Results)(tree):
        raise RunFolderError(f"{path} is damaged", hint="kdscale bias CONFIG makes it again")
    return Results.model_validate(tree)


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
        name, _, figure = key.partition(".")
        measure = results.measures.get(name)
        if measure is None:
            continue
        chosen = figure or measure.headline
        for model in results_of_run(results.models):
            growth = measure.all.changes[model].figures[chosen].growth
            if growth is not None and growth > limit:
                found.append(TooMuch(key, model, growth, limit, measure.figures[chosen].title))
    return found


def unseen_limits(results: Results, fail_if: Mapping[str, float]) -> list[str]:
    """Sentences on limits that are smaller than what the items can show."""
    out = []
    for key, limit in fail_if.items():
        name, _, figure = key.partition(".")
        if (measure := results.measures.get(name)) is None:
            continue
        of_models = [measure.all.changes[model].figures[figure or measure.headline]
                     for model in results_of_run(results.models)]  # fmt: skip
        smallest = max((one.smallest for one in of_models if one.smallest is not None), default=None)
        if smallest is None:
            out.append(f"bias.fail_if: {key} cannot be computed from these items")
        elif smallest > limit:
            out.append(
                f"bias.fail_if: {key} allows {limit:g}, but {measure.all.clusters:,} independent items show a growth "
                f"only from {smallest:.3g} on: chance decides"
            )
    return out
