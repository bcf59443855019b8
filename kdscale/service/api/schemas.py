"""What requests and answers hold, as JSON: the description at /openapi.json is made from these models.

Times are ISO 8601 in UTC. Every list is `{"items": [...], "next": cursor or null}`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from kdscale.config.fields import Name
from kdscale.service.database.events import Event
from kdscale.service.database.runs import Run
from kdscale.service.database.subscriptions import MOST as MOST_SUBSCRIPTIONS
from kdscale.service.notices.occasions import DEFAULT_KINDS, NoticeKind
from kdscale.service.redaction import redacted, redacted_text
from kdscale.service.states import RunState

_ID = "1hc9xqv3z-7m2k0ft"
_SETTING = Annotated[str, StringConstraints(max_length=20_000)]
_MOST_SET = 32_768  # characters of all settings together: each is YAML, which takes a second to read for 20,000
Item = TypeVar("Item")


class _Sent(BaseModel):
    """A body: strict, and nothing in it is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_max_length=200_000)


class Target(_Sent):
    """Where a run goes: an engine, and settings of its own beside it."""

    model_config = ConfigDict(extra="allow")

    engine: Name = "local"


class Notify(_Sent):
    """Who is told of a run: an https address that takes signed webhooks, or a mailto: address, and of what."""

    to: str = Field(max_length=2000, examples=["https://hooks.example/kdscale", "mailto:ada@example.org"])
    on: list[NoticeKind] = Field(default=list(DEFAULT_KINDS), min_length=1, max_length=10)


class _Submission(_Sent):
    set: list[_SETTING] = Field(default=[], max_length=500, examples=[["distill.tokens=1M"]])
    name: Name | None = Field(default=None, examples=["smollm2-half"])
    priority: int = Field(default=0, ge=-1000, le=1000)
    target: Target = Field(default=Target(), examples=[{"engine": "local"}])
    notify: list[Notify] = Field(default=[], max_length=MOST_SUBSCRIPTIONS, description="Who is told of it.")

    @field_validator("set")
    @classmethod
    def _is_read_soon(cls, settings: list[str]) -> list[str]:
        if (size := sum(map(len, settings))) > _MOST_SET:
            raise ValueError(f"expected at most {_MOST_SET:,} characters together, got {size:,}; send them in config")
        return settings


class Submission(_Submission):
    """A run to make: a config, or the name of one, and settings that change it."""

    config: dict[str, Any] | None = Field(default=None, examples=[None])
    config_name: str | None = Field(default=None, max_length=200, examples=["quick"])

    @model_validator(mode="after")
    def _one_config(self) -> Self:
        if (self.config is None) == (self.config_name is None):
            raise ValueError("config: expected either a config or a config_name")
        return self


class Again(_Submission):
    """What a new run has otherwise than the one that it is made from."""

    priority: int | None = Field(default=None, ge=-1000, le=1000)  # type: ignore[assignment]
    target: Target | None = None  # type: ignore[assignment]


class Question(Submission):
    """A config to check, and the cluster that the estimate is for; by default the devices of the service's machine."""

    gpu: str | None = Field(default=None, max_length=40, examples=["h100"])
    nodes: int = Field(default=1, ge=1, le=65_536)
    gpus_per_node: int | None = Field(default=None, ge=1, le=65_536)
    host_memory_bytes: int = Field(default=1 << 40, ge=1 << 20, le=1 << 60)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class ListOf(_Answer, Generic[Item]):
    """Some of a list. `next` is the value of `after` that gives the following ones; null at the end."""

    items: list[Item]
    next: str | None = None


class StageState(_Answer):
    """How far one stage of a run is."""

    name: str
    step: str = Field(default="", description="the step on the way to the student that it belongs to")
    title: str = ""
    state: str = Field(examples=["running"], description="waiting, running, stopped, done, failed or interrupted")
    time: str = Field(default="", description="when it came into this state")
    seconds: float = Field(default=0.0, description="how long it took, once it has ended")
    facts: dict[str, str | int | float] = {}
    reason: str = ""


# Of what the watcher keeps of a run: what is told. The rest is how it goes on reading.
_PROGRESS = (
    "stage", "share", "step", "steps", "tokens", "loss", "losses", "tokens_per_second", "seconds_left", "moved",
)  # fmt: skip


class RunSummary(_Answer):
    """A run in a list."""

    id: str = Field(examples=[_ID])
    name: str
    owner: str
    state: RunState
    reason: str = Field(description="why it is in this state, in words")
    priority: int
    created: datetime
    updated: datetime
    started: datetime | None
    ended: datetime | None
    attempt: int = Field(description="how many times it was started")
    config_name: str
    target: dict[str, Any]
    slots: int
    exit_code: int | None
    parent: str | None = Field(description="the run that it was made from")
    origin: str = Field(examples=["service"])
    progress: dict[str, Any] = Field(description="stage, share done, steps, tokens/s, seconds left, last losses")

    @classmethod
    def of(cls, run: Run, **more: Any) -> Self:
        """What the database has of a run."""
        values = {name: getattr(run, name) for name in RunSummary.model_fields}
        times = {name: as_time(values[name]) for name in ("created", "updated", "started", "ended")}
        values["progress"] = {name: run.progress[name] for name in _PROGRESS if name in run.progress}
        return cls(**{**values, **times, "reason": redacted_text(run.reason), **more})


class RunDetail(RunSummary):
    """All about a run."""

    stages: list[StageState]
    overrides: list[str]
    config: dict[str, Any] = Field(description="the resolved config, every default written out")
    links: dict[str, str]


class RunEvent(_Answer):
    """Something that happened to a run. `seq` grows; it is the id of the event in a stream."""

    seq: int
    run_id: str
    time: datetime
    type: str = Field(examples=["state"])
    data: dict[str, Any]

    @classmethod
    def of(cls, event: Event) -> Self:
        """An event of the database."""
        time = datetime.fromtimestamp(event.time, UTC)
        return cls(seq=event.seq, run_id=event.run_id, time=time, type=event.type, data=redacted(event.data))


class Series(_Answer):
    """A metric over the steps; `thinned`: its highest and lowest points of each stretch."""

    name: str = Field(examples=["train/loss"])
    steps: list[int]
    values: list[float]
    thinned: bool


class Metrics(_Answer):
    """Series of a run, and what else there is."""

    series: list[Series]
    names: list[str]
    last_step: int | None


class ArtifactEntry(_Answer):
    """A file of a run."""

    path: str = Field(examples=["student/model.safetensors"])
    bytes: int
    modified: datetime
    sha256: str | None = Field(description="null until it is computed: ask for the list again")


class Refusal(_Answer):
    """One thing in a config that cannot be used."""

    field: str
    detail: str
    expected: str = ""
    got: str = ""
    hint: str = ""


class Estimate(_Answer):
    """What a run will need, from shapes alone."""

    cluster: dict[str, Any]
    assumed: bool = Field(description="whether the cluster was assumed, because this machine has no GPU that is known")
    fits: bool
    setting: dict[str, Any] = Field(description="the best setting: ZeRO stage, teacher placement, batch, memory, speed")
    gpu_bytes: float
    tokens: int
    tokens_per_second: float
    days: float


class Verdict(_Answer):
    """Whether a config can be run, and what it would make. Nothing was started or written."""

    valid: bool
    refused: list[Refusal]
    notes: list[str]
    teacher_parameters: int | None = None
    student_parameters: int | None = None
    student: dict[str, int] | None = Field(default=None, description="the student's sizes, where a plan can say them")
    stages: list[str] = []
    estimate: Estimate | None = None
    config: dict[str, Any] | None = Field(default=None, description="the resolved config")


class TeacherEntry(_Answer):
    """A model that a config may name as its teacher."""

    name: str
    path: str | None = Field(description="what teacher.path takes; null where it is not on this machine yet")
    kind: Literal["folder", "catalog"]
    model_type: str | None = None
    parameters: int | None = None
    note: str = ""


class ConfigEntry(_Answer):
    """A config that a run may begin with."""

    name: str = Field(description="what config_name takes")
    kind: Literal["shipped", "run"]
    title: str


class ConfigText(ConfigEntry):
    """A config as it was written, and with every default."""

    text: str
    config: dict[str, Any]


class MachineFacts(_Answer):
    """The service's machine: what there is and what runs hold of it."""

    slots: int = Field(description="devices that runs share")
    slots_held: int
    held: dict[str, str] = Field(description="the run that holds each device")
    counts: dict[str, int] = Field(description="how many runs are in each state")
    engines: list[str]
    gpus: list[dict[str, Any]]
    processors: int
    load: float
    memory_bytes: int
    memory_free_bytes: int
    disk_bytes: int
    disk_free_bytes: int


class Health(_Answer):
    """Whether the service is alive."""

    status: Literal["ok"]
    version: str


def as_time(seconds: float | None) -> datetime | None:
    """A time of the database as a date."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
