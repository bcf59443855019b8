"""What may put the masked candidates of a search in order: one row a score.

The config accepts these names; the search, the report and the terminal read the rest. A new score is a row here and,
where masked runs do not give it yet, a part of `MaskedScore` in plan.json. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from pydantic import AfterValidator


@dataclass(frozen=True)
class CandidateScore:
    """One score of a masked run; `path` is where plan.json has it in the candidate's `masked`."""

    name: str
    _: KW_ONLY
    title: str  # in a sentence
    path: tuple[str, ...]
    higher_is_better: bool = False
    asks: bool = False  # whether candidates answer prune.search.tasks for it
    measured: bool = False  # whether masked runs give it on calibration text, and only where it is asked for

    def value(self, masked: Mapping[str, Any]) -> float | None:
        """The score in a `masked` of plan.json; None where it has none."""
        found: Any = masked
        for key in self.path:
            found = found.get(key) if found is not None else None
        return found

    def order(self, masked: Mapping[str, Any]) -> float:
        """What to sort by: the best comes first."""
        value = self.value(masked)
        assert value is not None, self.name
        return -value if self.higher_is_better else value


CANDIDATE_SCORES = (
    CandidateScore("kl", title="masked KL to the teacher", path=("kl",)),
    CandidateScore(
        "acceptance", title="tokens accepted from a draft", path=("acceptance",), higher_is_better=True, measured=True
    ),
    CandidateScore("task", title="score on tasks", path=("task", "score"), higher_is_better=True, asks=True),
)


def candidate_score(name: str) -> CandidateScore:
    """The row of this name. Raises ValueError for another name."""
    for row in CANDIDATE_SCORES:
        if row.name == name:
            return row
    raise ValueError(f"expected one of {', '.join(row.name for row in CANDIDATE_SCORES)}")


def score_used(masked: Mapping[str, Any]) -> CandidateScore:
    """The score that decided about a candidate with this `masked`: the last row that it has a value for."""
    return [row for row in CANDIDATE_SCORES if row.value(masked) is not None][-1]


def _known(name: str) -> str:
    candidate_score(name)
    return name


CandidateScoreName = Annotated[str, AfterValidator(_known)]
