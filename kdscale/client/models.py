"""What a service tells, as typed values. Members that a newer service adds are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict

RunState = Literal[
    "queued", "starting", "running", "recovering", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"
]
STATES: tuple[RunState, ...] = get_args(RunState)
ENDED: frozenset[RunState] = frozenset({"cancelled", "succeeded", "failed"})
Item = TypeVar("Item")


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Page(_Told, Generic[Item]):
    """Some of a list. `next` is the cursor of the following ones; None at the end."""

    items: list[Item]
    next: str | None = None


class Stage(_Told):
    """How far one stage of a run is; `seconds` is how long it took, `step` the step of the run that it belongs to."""

    name: str
    step: str = ""
    title: str = ""
    state: str
    time: str = ""
    seconds: float = 0.0
    facts: dict[str, str | int | float] = {}
    reason: str = ""


class Run(_Told):
    """A run as a list has it. `progress`: stage, share done, tokens/s, seconds left, last figures."""

    id: str
    name: str
    owner: str
    state: RunState
    reason: str
    priority: int
    created: datetime
    updated: datetime
    started: datetime | None
    ended: datetime | None
    attempt: int
    config_name: str
    target: dict[str, Any]
    slots: int
    exit_code: int | None
    parent: str | None
    origin: str
    progress: dict[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether nothing follows by itself."""
        return self.state in ENDED


class RunDetail(Run):
    """All about a run; `config` is the resolved one."""

    stages: list[Stage]
    overrides: list[str]
    config: dict[str, Any]


class Event(_Told):
    """Something that happened to a run; `seq` grows."""

    seq: int
    run_id: str
    time: datetime
    type: str
    data: dict[str, Any]


class Series(_Told):
    """A metric over the steps. `thinned`: the highest and lowest points of each stretch."""

    name: str
    steps: list[int]
    values: list[float]
    thinned: bool


class Metrics(_Told):
    """Series of a run, and the names of all that it has."""

    series: list[Series]
    names: list[str]
    last_step: int | None


class Artifact(_Told):
    """A file of a run; `sha256` is None until the service has computed it."""

    path: str
    bytes: int
    modified: datetime
    sha256: str | None


class Refusal(_Told):
    """One thing in a config that cannot be used."""

    field: str
    detail: str
    expected: str = ""
    got: str = ""
    hint: str = ""


class Estimate(_Told):
    """What a run will need, from shapes alone; `assumed`: for a cluster that nobody named."""

    cluster: dict[str, Any]
    assumed: bool
    fits: bool
    setting: dict[str, Any]
    gpu_bytes: float
    tokens: int
    tokens_per_second: float
    days: float


class Verdict(_Told):
    """Whether a config can be run, and what it would make."""

    valid: bool
    refused: list[Refusal]
    notes: list[str]
    teacher_parameters: int | None = None
    student_parameters: int | None = None
    student: dict[str, int] | None = None
    stages: list[str] = []
    estimate: Estimate | None = None
    config: dict[str, Any] | None = None
