"""The whole configuration: typed, strict, one place.

Precedence: the defaults below < the YAML file < `--set dotted.key=value`. Everything is checked before any work: an
unknown key, a wrong type or a value out of range is one ConfigError that names every offending field.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from kdscale.config.correct import CorrectConfig, ShortTraining
from kdscale.config.data import RESPONSES_SOURCE, DataConfig
from kdscale.config.distill.settings import DistillConfig
from kdscale.config.distill.targets import TEACHER_TOKEN
from kdscale.config.distill.teachers import TEACHER_SETTINGS
from kdscale.config.evaluation.bias import BiasConfig
from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.fields import Count, Device, Name, Seconds, Section, explain_errors
from kdscale.config.prune import PRUNED_AXES, ImportanceConfig, PruneConfig
from kdscale.config.quantize import Int4Config, QuantizeConfig
from kdscale.config.responses.settings import ResponsesConfig
from kdscale.config.target_store import TargetsConfig
from kdscale.config.telemetry import TrackingConfig
from kdscale.files import sha256_json
from kdscale.units import BUDGET_FIELDS
from kdscale_launch.environment import has_credentials


class TeacherConfig(Section):
    """The model to shrink: a folder with config.json, tokenizer and safetensors, or a hub id (`org/name`)."""

    path: str = Field(min_length=1)
    revision: str | None = None  # only for a hub id
    trust_remote_code: bool = False
    # folders of LoRA adapters as peft saves them, merged into the weights in this order; None: none
    adapters: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        strict=False, min_length=1, max_length=64, default=None
    )


class StudentConfig(Section):
    """A ready model that learns, in place of a pruned one: a folder or hub id, as of the teacher, with its tokens."""

    path: str = Field(min_length=1)
    revision: str | None = None  # only for a hub id


class RuntimeConfig(Section):
    """Where and how a process runs; the student does not depend on it, up to rounding."""

    device: Device = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # CPU threads a process; None: cores / processes
    # seconds without progress after which a stage other than the distillation counts as hung, four times as many while
    # it loads; 0: never
    watchdog_seconds: Seconds = 3600.0
    # bytes of calibration hidden states a process holds in memory; the rest goes to the run folder's disk
    activation_bytes: Count = 1_073_741_824


class StepConfig(Section):
    """One step on the way to the config's own student: what it says differently of prune and distill.

    The config's target and sizes are the last step's: none of them is inherited. All other fields are.
    """

    name: Name
    prune: dict[str, Any]
    distill: dict[str, Any] = Field(default_factory=dict)


class Config(Section):
    """A run: the teacher, the text, what to prune, how to distil, what to measure."""

    name: Name
    run_dir: str = Field(min_length=1)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    teacher: TeacherConfig
    responses: ResponsesConfig | None = None  # null: the teacher answers no prompts
    data: DataConfig = DataConfig()
    correct: CorrectConfig | None = None  # None: the teacher teaches as it is
    importance: ImportanceConfig = ImportanceConfig()
    student: StudentConfig | None = None  # None: the teacher, pruned
    prune: PruneConfig = PruneConfig()
    targets: TargetsConfig | None = None  # None: no targets are stored
    distill: DistillConfig = DistillConfig()
    quantize: QuantizeConfig | None = None  # None: the student is written as it was distilled, and in no other form
    eval: EvalConfig = EvalConfig()
    bias: BiasConfig | None = None  # None: bias and safety are not measured
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()
    # run before the config's own prune and distill, each from the student of the one before
    steps: tuple[StepConfig, ...] = Field(strict=False, max_length=64, default=())

    @model_validator(mode="after")
    def _steps_are_configs(self) -> Config:
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names):
            raise ValueError(f"steps: every name once, got {', '.join(names)}")
        for index, step in enumerate(self.steps):
            try:
                self.step(index)
            except ValidationError as error:
                raise ValueError(f"steps ({step.name}): " + "; ".join(explain_errors(error, Config))) from error
        return self

    @model_validator(mode="after")
    def _student_is_ready_or_pruned(self) -> Config:
        if self.student is None:
            self.prune.check_says_what_to_cut()
            return self
        for name, unsupported in (
            ("prune.target_* and sizes", self.prune.cuts),
            ("steps", bool(self.steps)),
        ):
            if unsupported:
                raise ValueError(f"student: a ready model is not pruned, so it does not go with {name}")
        return self

    @model_validator(mode="after")
    def _store_gives_the_targets(self) -> Config:
        if not self._reads_a_store:
            return self
        if self.targets is None:
            raise ValueError("distill.teacher_placement: cached needs a section targets, which says what is stored")
        self.targets.check_gives(self.distill.needs)
        if others := [
            entry.name for entry in self.distill.teachers if entry.path and entry.teacher_placement == "cached"
        ]:
            raise ValueError(
                f"distill.teachers ({others[0]}): the store has the targets of the run's own teacher alone"
            )
        if self.prune.search.probe_tokens is not None:
            raise ValueError(
                "prune.search.probe_tokens does not go with distill.teacher_placement: cached, whose targets are "
                "stored when the shape is chosen"
            )
        return self

    @model_validator(mode="after")
    def _answers_come_with_logprobs(self) -> Config:
        if not any(one.source.name == "responses" for one in self.distill.by_teacher().values()):
            return self
        given = self.responses.sampling.top_logprobs if self.responses is not None else 0
        if given < self.distill.needs.top_k:
            raise ValueError(
                "distill.teacher_placement: responses needs responses.sampling.top_logprobs of at least the "
                f"objectives' top_k ({self.distill.needs.top_k}), got {given}"
            )
        return self

    @model_validator(mode="after")
    def _groups_divide_the_multiple(self) -> Config:
        multiple, group = self.prune.multiple_of, 1 if self.quantize is None else self.quantize.multiple
        if multiple is not None and multiple % group:
            raise ValueError(f"prune.multiple_of ({multiple}) must be a multiple of {group}, a group of quantize.forms")
        return self

    @property
    def shaping(self) -> PruneConfig:
        """`prune` with what the groups of `quantize` ask of the student's widths, for whoever chooses them."""
        if self.prune.multiple_of is not None or self.quantize is None:
            return self.prune
        return self.prune.model_copy(update={"multiple_of": self.quantize.multiple})

    @property
    def _reads_a_store(self) -> bool:
        return any(one.source.name == "cached" for one in self.distill.by_teacher().values())

    def decisive_for_student(self) -> dict[str, Any]:
        """The settings that the distilled student's values depend on, beside the seed."""
        cached = self.targets if self._reads_a_store else None
        return {**self.distill.decisive(), **({"targets": cached.decisive()} if cached else {})}

    @model_validator(mode="after")
    def _answers_come_from_a_stage(self) -> Config:
        if self.responses is None and any(source.path == RESPONSES_SOURCE for source in self.data.all_sources):
            raise ValueError(f"data.sources: {RESPONSES_SOURCE} needs a section responses, which says who answers what")
        return self

    def step(self, index: int) -> Config:
        """The config of one of the steps: a run of its own under `steps/` in the run folder, on the same text."""
        step, tree = self.steps[index], self.resolved()
        inherited = {key: value for key, value in tree["prune"].items() if key not in _NOT_INHERITED}
        return Config.model_validate(
            {
                **tree,
                "name": f"{self.name}-{step.name}",
                "run_dir": f"{self.run_dir}/steps/{index + 1}-{step.name}",
                "prune": _merged(inherited, step.prune),
                "distill": _merged(tree["distill"], step.distill),
                "quantize": None,
                "bias": None,
                "steps": (),
            }
        )

    @model_validator(mode="after")
    def _correction_is_a_config(self) -> Config:
        try:
            self.correction()
        except ValidationError as error:
            raise ValueError("correct: " + "; ".join(explain_errors(error, Config))) from error
        return self

    def correction(self) -> Config | None:
        """The config of the teacher's fine-tuning: a run of its own under `work/`, on the same text; None without."""
        if self.correct is None:
            return None
        changes = {
            **_OF_NO_TEACHER, "objectives": [{"name": "cross_entropy"}], "fake_quantize": None, "lora": None,
            "on_policy": None, "preferences": None,
        }  # fmt: skip
        return self._short(self.correct, "correct", "correct", changes)

    def training_on_grid(self, form: Int4Config) -> Config:
        """The config of the training for a form whose method is `distilled`: a run of its own under `work/`.

        It goes on from the distilled student, on the same text in another order, unless stored targets are for the one.
        """
        served, optimizer = self.distill.served, self.distill.optimizer
        if served.token_file is None:
            served = served.model_copy(update={"token_file": f"{self.run_dir}/{TEACHER_TOKEN}"})
        changes = {
            "fake_quantize": {"bits": form.bits, "group": form.group_size}, "compile": "off", "shorter_first": (),
            "served": served.model_dump(mode="json"), "optimizer": {"min_lr": optimizer.min_lr * form.lr_share},
            "lora": None, "on_policy": None, "preferences": None,
        }  # fmt: skip
        inner = self._short(form, form.label, f"quantize/training-{form.label}", changes)
        steps = inner.distill.tokens // (inner.distill.global_batch * inner.distill.seq_len)
        warmup, asked = inner.distill.optimizer.warmup_steps, form.distill.get("optimizer", {})
        if "warmup_steps" not in asked:
            warmup = min(warmup, steps // 5)
        optimizer = inner.distill.optimizer.model_copy(update={"warmup_steps": warmup})
        seed = self.seed if self._reads_a_store else (self.seed + 1) % 2**32
        return inner.model_copy(
            update={"seed": seed, "distill": inner.distill.model_copy(update={"optimizer": optimizer})}
        )

    def _short(self, training: ShortTraining, name: str, folder: str, changes: dict[str, Any]) -> Config:
        """The config of a training under `work/`, whose settings differ from distill's by `changes` and its own."""
        tree, lr = self.resolved(), self.distill.optimizer.lr * training.lr_share
        distill = _merged(tree["distill"], {"optimizer": {"lr": lr}})
        distill = _merged(_merged(distill, changes), training.distill)
        few = max(self.distill.tokens // 10, self.distill.global_batch * self.distill.seq_len)
        return Config.model_validate(
            {
                **tree,
                "name": f"{self.name}-{name}",
                "run_dir": f"{self.run_dir}/work/{folder}",
                "correct": None,
                "quantize": None,
                "bias": None,
                "distill": {**distill, "tokens": training.tokens or few},
                "steps": (),
            }
        )

    @model_validator(mode="after")
    def _trainings_on_grids_are_configs(self) -> Config:
        for form in self.quantize.trained if self.quantize is not None else ():
            try:
                self.training_on_grid(form)
            except ValidationError as error:
                raise ValueError(
                    f"quantize.forms ({form.label}): " + "; ".join(explain_errors(error, Config))
                ) from error
        return self

    @model_validator(mode="after")
    def _holds_no_credentials(self) -> Config:
        """The config is written, hashed, reported and published: one check for every text in it."""
        if fields := [field for field, text in _texts(self.resolved()) if has_credentials(text)]:
            raise ValueError(
                f"{', '.join(fields)}: a config is published with its run: no user, password or token in a URL; give"
                " the address without it, and the secret in a variable or a file"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """Plain values, every default written out: what is stored as run/config.yaml and hashed."""
        return self.model_dump(mode="json")

    def fingerprint(self, *sections: str) -> str:
        """Hash of the named top-level sections (all of them when none is named)."""
        plain = self.resolved()
        return sha256_json({key: plain[key] for key in sections or sorted(plain)})


# Fields that set a step's size: a step says its own, and does not take the config's.
_NOT_INHERITED = {*BUDGET_FIELDS, *PRUNED_AXES}


# What a training without a teacher has of the settings on teachers: the defaults.
_OF_NO_TEACHER = DistillConfig().model_dump(mode="json", include=TEACHER_SETTINGS)


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree of plain values, with its dotted field; a mapping's keys count as texts too."""
    if isinstance(value, str):
        yield field, value
    for key, item in value.items() if isinstance(value, dict) else ():
        yield field, str(key)
        yield from _texts(item, f"{field}.{key}" if field else str(key))
    for item in value if isinstance(value, list) else ():
        yield from _texts(item, field)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out
