"""`distill`: the distillation, from the teacher's place to what is kept on disk."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdscale.config.distill.lora import LoraConfig, base_problems
from kdscale.config.distill.masking import MaskingConfig
from kdscale.config.distill.objective import ObjectiveConfig, Term
from kdscale.config.distill.objectives import ObjectiveEntry, TokenDivergenceConfig, check_objectives, log_columns
from kdscale.config.distill.on_policy import OnPolicyConfig, PreferencesConfig
from kdscale.config.distill.optimizer import FakeQuantizeConfig, GuardConfig, OptimizerConfig, ShorterPhase
from kdscale.config.distill.recompute import RECOMPUTE, Recompute, RecomputeLevel
from kdscale.config.distill.targets import SEVERAL, TEXT_ALONE, Needs, Source, check_source, combined, source_of
from kdscale.config.distill.teachers import SourceSettings, TeacherEntry, check_teachers
from kdscale.config.distill.zero import ZeroConfig
from kdscale.config.fields import Count, Dtype, Few, Length, Seconds
from kdscale.config.telemetry import ProfileConfig, SpikeConfig

TeacherDtype = Literal["auto", "float32", "bfloat16", "float8", "int8"]
EIGHT_BITS = ("float8", "int8")  # of them


class DistillConfig(SourceSettings):
    """How the student is trained, on how many processes, and what is kept of it."""

    # with steps: whose distribution this student learns, the teacher of the whole run or the step's own, larger model
    teacher: Literal["original", "previous"] = "original"
    # several teachers in place of the one; empty: the run's own
    teachers: tuple[TeacherEntry, ...] = Field(strict=False, max_length=64, default=())
    # of teachers in the ranks; auto: the student's; 8 bits: of the linear maps of its layers, see teacher.placement
    teacher_dtype: TeacherDtype = "auto"
    # on a GPU: the teacher's forward of the next micro-batch beside the student's backward, for more memory
    teacher_overlap: bool = False
    tokens: Count = 1_000_000
    seq_len: Length = 512
    shorter_first: tuple[ShorterPhase, ...] = Field(strict=False, max_length=16, default=())  # then seq_len
    global_batch: Length = 8  # sequences a step, over all ranks
    micro_batch: Few = 4  # sequences a forward, a rank
    processes: Few = 1  # in all: data × sequence × tensor parallel ranks
    sequence_parallel: Few = 1  # ranks that share a sequence's positions
    tensor_parallel: Few = 1  # ranks that share each layer's heads and units, and the vocabulary
    dtype: Dtype = "auto"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    zero: ZeroConfig = ZeroConfig()
    gradient_checkpointing: RecomputeLevel = "off"
    # torch.compile of the decoder layers of student and in-process teacher; auto: on GPUs that can run what it makes
    compile: Literal["auto", "off", "layers"] = "auto"
    # quantisation-aware training; null: the student computes with its weights as they are
    fake_quantize: FakeQuantizeConfig | None = None
    lora: LoraConfig | None = None  # adapters alone are trained; null: all weights are
    optimizer: OptimizerConfig = OptimizerConfig()
    # of an encoder's text: tokens that are hidden, and told by the objectives on tokens; null: none are
    masking: MaskingConfig | None = None
    # whether the student drops hidden units and attention in training where its config.json says so
    dropout: bool = True
    # their weighted sum is the loss
    objectives: tuple[ObjectiveEntry, ...] = Field(strict=False, default=(TokenDivergenceConfig(),))
    # sequences that the student writes; null: it learns from the run's text alone
    on_policy: OnPolicyConfig | None = None
    preferences: PreferencesConfig | None = None  # sequences of pairs of answers
    guard: GuardConfig = GuardConfig()
    spikes: SpikeConfig = SpikeConfig()
    profile: ProfileConfig = ProfileConfig()
    # what one rank's device can do a second, for MFU; null: by the GPU's name, and no MFU on a CPU
    peak_flops: Annotated[float, Field(gt=0.0, le=1e18)] | None = None
    validate_every: Count = 50  # steps
    validate_tokens: Count = 8_192
    checkpoint_every: Count = 50  # steps
    # and when so much time has passed since the last one; null: by steps alone
    checkpoint_minutes: Annotated[float, Field(gt=0.0, le=1e6)] | None = 15.0
    # a rank that makes no progress for so long ends itself; None: by device; 0: never
    watchdog_seconds: Seconds | None = None
    keep_checkpoints: Few = 2  # the newest
    keep_every: Count | None = None  # steps; these are kept for ever
    async_checkpoints: bool = False  # written behind the training's back, from a copy in host memory

    @model_validator(mode="after")
    def _tokens_fill_a_step(self) -> DistillConfig:
        if self.tokens < self.global_batch * self.seq_len:
            raise ValueError(
                f"tokens ({self.tokens:,}) must be at least one step, global_batch × seq_len "
                f"({self.global_batch * self.seq_len:,})"
            )
        return self

    @model_validator(mode="after")
    def _phases_grow(self) -> DistillConfig:
        lengths = [*(phase.seq_len for phase in self.shorter_first), self.seq_len]
        ends = [phase.until for phase in self.shorter_first]
        if lengths != sorted(set(lengths)) or ends != sorted(set(ends)):
            raise ValueError(
                f"shorter_first: expected seq_len to grow from phase to phase up to {self.seq_len}, and until, got "
                f"seq_len {lengths[:-1]}, until {ends}"
            )
        for length in lengths[:-1]:
            if self.seq_len % length or length % self.sequence_parallel:
                raise ValueError(
                    f"shorter_first: expected seq_len to divide {self.seq_len}, and to be a multiple of "
                    f"sequence_parallel ({self.sequence_parallel}), got {length}"
                )
        if self.shorter_first and any(one.source.name == "cached" for one in self.by_teacher().values()):
            raise ValueError(
                "shorter_first: does not go with teacher_placement: cached, whose targets are of one length of sequence"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> DistillConfig:
        split = self.sequence_parallel * self.tensor_parallel
        if self.processes % split:
            raise ValueError(
                f"processes ({self.processes}) must be a multiple of sequence_parallel × tensor_parallel ({split})"
            )
        sequences = self.micro_batch * self.data_parallel
        if self.global_batch % sequences:
            ranks = "processes" if split == 1 else "data-parallel ranks"
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of micro_batch × {ranks} ({sequences})"
            )
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of checkpoint_every ({self.checkpoint_every})"
            )
        return self

    @model_validator(mode="after")
    def _objectives_get_their_targets(self) -> DistillConfig:
        check_objectives(self.objectives, masked=self.masking is not None)
        for entry in self.objectives:
            if entry.only_own_text:
                raise ValueError(f"objectives: {entry.name} is for text of the student's own: put it in on_policy")
            if entry.only_pairs:
                raise ValueError(f"objectives: {entry.name} compares two answers: put it in preferences")
        check_teachers(self.teachers, self.all_objectives)
        for name, settings in self.by_teacher().items():
            try:
                settings._source_gives_them()
            except ValueError as error:
                raise ValueError(f"teachers ({name}): {error}" if self.teachers else str(error)) from error
        return self

    @model_validator(mode="after")
    def _student_can_write(self) -> DistillConfig:
        own = self.own_text
        if own is None:
            return self
        longest = own.least_sequence
        if longest > self.seq_len:
            tokens = "prompt_tokens + max_new_tokens" + (f", {own.answers} times," if own.answers > 1 else "")
            raise ValueError(f"{own.section}: {tokens} ({longest:,}) must fit into seq_len ({self.seq_len:,})")
        for name, unsupported in (
            ("on_policy: one of the two takes the place of text", own is not self.on_policy and bool(self.on_policy)),
            ("shorter_first", bool(self.shorter_first)),
            ("sequence_parallel above 1", self.sequence_parallel > 1),
            ("tensor_parallel above 1, where no rank has the student whole", self.tensor_parallel > 1),
            *(
                (f"the objective {entry.name}, which reads layers or counts sequences", True)
                for entry in self.objectives
                if entry.matches_layers or entry.count != "tokens"
            ),
            *(
                (f"teacher_placement: {one.teacher_placement}, which knows the run's text alone", not one.any_text)
                for one in self.by_teacher().values()
            ),
            ("prompts from files and teachers with tags", bool(own.prompts) and any(e.tags for e in self.teachers)),
            ("several teachers", own is self.preferences and bool(self.teachers)),
        ):
            if unsupported:
                raise ValueError(f"{own.section}: does not go with {name}")
        return self

    @property
    def any_text(self) -> bool:
        """Whether this teacher's source scores text that was not there before."""
        return source_of(self.teacher_placement).any_text

    @property
    def all_objectives(self) -> tuple[ObjectiveConfig, ...]:
        """Those on the run's text, then those on what the student writes."""
        return (*self.objectives, *(self.own_text.objectives if self.own_text is not None else ()))

    @property
    def own_text(self) -> OnPolicyConfig | None:
        """What stands in place of some of the run's text."""
        return self.preferences or self.on_policy

    @property
    def columns(self) -> list[Term]:
        """What every step logs of the objectives."""
        own = self.own_text
        return log_columns(self.objectives, *(() if own is None else (own.objectives, own.section)))

    @model_validator(mode="after")
    def _student_can_be_averaged(self) -> DistillConfig:
        if not self.followers:
            return self
        for name, unsupported in (
            ("zero_stage: 3, where no rank has the student's weights whole", self.zero_stage == 3),
            ("tensor_parallel above 1", self.tensor_parallel > 1),
        ):
            if unsupported:
                raise ValueError(f"teacher_placement: ema does not go with {name}")
        alone = len(self.followers) == len(self.by_teacher())
        if alone and not any(entry.reads_labels for entry in self.objectives):
            raise ValueError(
                "teacher_placement: ema begins as the student itself, which would have nothing to learn: give "
                "ce_weight, or another teacher beside it"
            )
        return self

    def _source_gives_them(self) -> None:
        check_source(self.teacher_placement, combined(entry.needs for entry in self.objectives))
        try:
            check_source(self.teacher_placement, self.needs)
        except ValueError as error:
            section = self.own_text.section if self.own_text is not None else ""
            raise ValueError(f"{section}.objectives: with {error}, or targets: topk") from error
        if self.source.name == "served" and not self.served.urls:
            raise ValueError("teacher_placement: served needs served.urls, where kdscale serve-teacher answers")
        if self.source.name == "endpoint" and (missing := self.endpoint.missing()):
            raise ValueError(f"teacher_placement: endpoint needs endpoint.{' and endpoint.'.join(missing)}")

    def by_teacher(self) -> dict[str, DistillConfig]:
        """These settings as the source of each teacher has them, by its name; of the run's own alone, under ""."""
        fields = list(SourceSettings.model_fields)
        return {
            entry.name: self.model_copy(update={"teachers": (), **{field: getattr(entry, field) for field in fields}})
            for entry in self.teachers
        } or {"": self}

    @model_validator(mode="after")
    def _teacher_has_its_dtype(self) -> DistillConfig:
        dtype = self.teacher_dtype
        if dtype in EIGHT_BITS and self.teachers:
            raise ValueError(f"teacher_dtype ({dtype}) is for the run's own teacher, not for several: use bfloat16")
        if self.teacher_dtype != "auto" and not self.source.in_process:
            raise ValueError(
                f"teacher_dtype ({self.teacher_dtype}) is for a teacher in the ranks, not for {self.source.name} "
                "targets: use auto"
            )
        if dtype in EIGHT_BITS and (self.teacher_placement != "replicated" or self.tensor_parallel > 1):
            raise ValueError(
                f"teacher_dtype ({dtype}) needs teacher_placement: replicated and tensor_parallel: 1, got "
                f"{self.teacher_placement} and {self.tensor_parallel}"
            )
        placements = sorted({one.teacher_placement for one in self.by_teacher().values()})
        # collectives of two streams could begin in another order on each rank
        if self.teacher_overlap and (placements != ["replicated"] or self.tensor_parallel * self.sequence_parallel > 1):
            raise ValueError(
                "teacher_overlap (true) needs teacher_placement: replicated, tensor_parallel: 1 and sequence_parallel: "
                f"1, got {' and '.join(placements)}, {self.tensor_parallel} and {self.sequence_parallel}"
            )
        return self

    @model_validator(mode="after")
    def _layers_can_be_shared(self) -> DistillConfig:
        if self.tensor_parallel > 1:
            for name, unsupported in (
                ("sequence_parallel above 1", self.sequence_parallel > 1),
                *((objectives, True) for objectives in self.need_whole_head()),
                ("objectives on sampled tokens (targets: sampled) of a teacher in the ranks", self._draws_from_shards),
                *(
                    (f"teacher_placement: {one.teacher_placement}", not one.source.same_on_all_ranks)
                    for one in self.by_teacher().values()
                ),
                ("zero.hpz_partition_size above 1", self.zero.hpz_partition_size > 1),
                ("zero.quantized_weights", self.zero.quantized_weights),
                ("zero.quantized_gradients", self.zero.quantized_gradients),
            ):
                if unsupported:
                    raise ValueError(f"tensor_parallel ({self.tensor_parallel}) does not go with {name}")
        if self.sequence_parallel > 1:
            for entry in self.objectives:
                if why := entry.needs_whole_sequences:
                    raise ValueError(
                        f"sequence_parallel ({self.sequence_parallel}) does not go with {entry.name}, which {why}"
                    )
        return self

    @model_validator(mode="after")
    def _layers_can_be_on_a_grid(self) -> DistillConfig:
        for name, unsupported in (
            ("tensor_parallel above 1, whose ranks would cut groups of inputs", self.tensor_parallel > 1),
            ("compile: layers, which would round otherwise", self.compile == "layers"),
            ("zero.quantized_weights, which puts the weights on a grid of its own", self.zero.quantized_weights),
        ):
            if self.fake_quantize is not None and unsupported:
                raise ValueError(f"fake_quantize: does not go with {name}")
        return self

    @model_validator(mode="after")
    def _adapters_can_be_trained(self) -> DistillConfig:
        own, problems = self.own_text, list[str]()
        if self.lora is not None:
            problems = self.lora.problems(
                tensor_parallel=self.tensor_parallel, on_a_grid=self.fake_quantize is not None,
                averaged=bool(self.followers), sent_whole=own is not None and own.writer == "vllm",
            )  # fmt: skip
        if "base" in {one.teacher_placement for one in self.by_teacher().values()}:
            problems += base_problems(
                self.lora, zero_stage=self.zero_stage, several=bool(self.teachers),
                reads_labels=any(entry.reads_labels for entry in self.all_objectives),
                ranks_pairs=any(entry.needs_reference and entry.needs.label for entry in self.all_objectives),
            )  # fmt: skip
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _zero_can_do_it(self) -> DistillConfig:
        problems = self.zero.problems(self.zero_stage, self.processes)
        if self.async_checkpoints and self.zero.offload_optimizer == "nvme":
            problems.append("async_checkpoints: would hold in host memory what zero.offload_optimizer puts on NVMe")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def needs(self) -> Needs:
        """The parts of the teacher's targets that the objectives read."""
        return combined(entry.needs for entry in self.all_objectives)

    def need_whole_head(self) -> list[str]:
        """The objectives that ranks which share the head's rows cannot compute, in words."""
        full = ["objectives on the teacher's whole vocabulary (targets: full)"] if self.needs.full else []
        return full + [f"the objective {entry.name}" for entry in self.objectives if not entry.reads_head_shards]

    @property
    def _draws_from_shards(self) -> bool:
        """Whether tokens would have to be drawn from a distribution that no rank has whole."""
        return self.needs.sampled > 0 and any(one.source.in_process for one in self.by_teacher().values())

    @property
    def recompute(self) -> Recompute:
        """What the student's layers compute again in the backward."""
        return RECOMPUTE[self.gradient_checkpointing]

    @property
    def source(self) -> Source:
        """Where the targets come from."""
        if self.needs.nothing:
            return TEXT_ALONE
        return SEVERAL if self.teachers else source_of(self.teacher_placement)

    @property
    def followers(self) -> list[str]:
        """The teachers that are made of the student's weights: their names, or "" of the run's only one."""
        return [name for name, settings in self.by_teacher().items() if settings.source.follows_student]

    @property
    def source_timeout(self) -> float | None:
        """Seconds that targets from elsewhere may take; None where they are made in the training's own processes."""
        timeouts = {"served": self.served.timeout, "endpoint": self.endpoint.timeout}
        if self.source is SEVERAL:
            return max((one.source_timeout or 0.0 for one in self.by_teacher().values()), default=0.0) or None
        return timeouts.get(self.source.name)

    @property
    def data_parallel(self) -> int:
        """Groups of ranks that each take sequences of their own."""
        return self.processes // (self.sequence_parallel * self.tensor_parallel)

    def decisive(self) -> dict[str, Any]:
        """The settings that the student's values depend on: all but where things run and what is watched or kept."""
        decisive = {key: value for key, value in self.model_dump(mode="json").items() if key not in FREE_SETTINGS}
        teachers = [entry.decisive() for entry in self.teachers]
        for section in ("fake_quantize", "lora", "masking"):
            if decisive[section] is None:
                del decisive[section]  # runs of older versions go on
        if self.dropout:
            del decisive["dropout"]
        if self.on_policy is None:
            del decisive["on_policy"]
        else:
            decisive["on_policy"] = self.on_policy.decisive()
        del decisive["preferences"]
        return {
            **decisive,
            **({"preferences": self.preferences.decisive()} if self.preferences is not None else {}),
            "teachers": teachers,
            "averages": self.followers,
            "zero": {key: getattr(self.zero, key) for key in DECISIVE_ZERO},
        }


DECISIVE_ZERO = ("gradient_dtype", "quantized_weights", "quantized_gradients")  # of distill.zero: they change values

# With any values of these the student is the same up to rounding: a run may change them and go on.
FREE_SETTINGS = {
    "teacher_placement", "teacher_overlap", "served", "endpoint", "processes", "sequence_parallel", "tensor_parallel",
    "micro_batch", "zero_stage", "gradient_checkpointing", "compile", "validate_every", "validate_tokens",
    "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_every", "async_checkpoints",
    "watchdog_seconds", "spikes", "profile", "peak_flops", "zero",
}  # fmt: skip
