"""`targets`: the teacher's targets, computed once and kept in a store that any number of students read."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from kdscale.config.distill.targets import ANY_NUMBER, Draws, Needs, PlacementName, source_of
from kdscale.config.fields import Count, Few, Length, Section, named_entry

Temperature = Annotated[float, Field(gt=1e-3, le=1e3)]


class CodecConfig(Section):
    """What is stored of a position, and in how many bits: what all codecs have.

    A new codec is a subclass with its settings, a row of CODECS, and a file with its implementation.
    """

    implementation: ClassVar[str]  # "module:class", called with the settings, rows of the teacher's head, hidden size

    name: str

    @property
    def asks(self) -> Needs:
        """What the teacher is asked for when the store is written."""
        raise NotImplementedError

    @property
    def gives(self) -> Needs:
        """What can be read from the store."""
        return self.asks


class SampledConfig(CodecConfig):
    """Tokens drawn from the teacher, and how often each was: unbiased (RS-KD, arXiv 2503.16870)."""

    implementation = "kdscale.teacher.store.sampled:SampledCodec"

    name: Literal["sampled"] = "sampled"
    draws: Draws = 25
    temperature: Temperature = 1.0

    @property
    def asks(self) -> Needs:
        """Draws from the distribution at this temperature."""
        return Needs(sampled=self.draws, temperature=self.temperature)


class TopKConfig(CodecConfig):
    """The most likely tokens and the log-sum-exp; logits in 5 to 16 bits below the row's largest, or exact in 32."""

    implementation = "kdscale.teacher.store.topk:TopKCodec"

    name: Literal["topk"] = "topk"
    top_k: Length = 64
    bits: Literal[5, 6, 8, 16, 32] = 6
    temperature: Temperature = 1.0

    @property
    def asks(self) -> Needs:
        """The top K at this temperature."""
        return Needs(top_k=self.top_k, temperature=self.temperature)


class HiddenConfig(CodecConfig):
    """The teacher's final hidden states, from which its head rebuilds every logit at any temperature."""

    implementation = "kdscale.teacher.store.hidden:HiddenCodec"

    name: Literal["hidden"] = "hidden"
    dtype: Literal["int8", "float8", "bfloat16", "float32"] = "int8"

    @property
    def asks(self) -> Needs:
        """What enters the head."""
        return Needs(full=True)

    @property
    def gives(self) -> Needs:
        """All that the head can make of it."""
        return Needs(full=True, top_k=ANY_NUMBER, sampled=ANY_NUMBER, temperature=None)


CODECS: dict[str, type[CodecConfig]] = {"sampled": SampledConfig, "topk": TopKConfig, "hidden": HiddenConfig}

CodecEntry = Annotated[
    SerializeAsAny[CodecConfig], BeforeValidator(lambda entry: named_entry(entry, CODECS, CodecConfig, "a codec"))
]


MOST_SHARDS = 64  # files of a store, about, unless they are full

# A run may change these of `targets` and go on: they say where and by whom a store is written, not what is in it.
FREE_SETTINGS = {"path", "teacher_placement", "micro_batch", "processes", "shard_tokens"}


class TargetsConfig(Section):
    """What is stored, of which positions, and where."""

    codec: CodecEntry = SampledConfig()
    # a folder that several runs share; None: targets/ in the run folder
    path: Annotated[str, Field(min_length=1)] | None = None
    # where the teacher's weights are while the store is written, as in distill.teacher_placement
    teacher_placement: PlacementName = "replicated"
    # of the training sequences: all, or those where the pruned student's distribution has the highest entropy
    positions: Literal["all", "entropy"] = "all"
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2  # of each sequence's positions, with positions: entropy
    micro_batch: Few = 4  # sequences a forward
    processes: Few | None = None  # ranks on this machine that write; None: one a GPU, one on a CPU
    shard_tokens: Count = 4_194_304  # the most in a file

    @model_validator(mode="after")
    def _teacher_can_write(self) -> TargetsConfig:
        if self.teacher_placement in ("cached", "partitioned", "ema", "responses"):
            raise ValueError(
                f"teacher_placement ({self.teacher_placement}) must be another one: ranks that write do not run "
                "forwards together, and a store is not made from a store, nor of a teacher "
                "that changes, nor of answers, which have targets at some positions alone"
            )
        if missing := self.codec.asks.missing_from(source_of(self.teacher_placement).gives):
            raise ValueError(f"teacher_placement ({self.teacher_placement}) does not give {missing}")
        return self

    @property
    def most_processes(self) -> int:
        """A rank needs a file of its own to write."""
        return MOST_SHARDS

    def decisive(self) -> dict[str, Any]:
        """The settings that a student's values depend on."""
        share = self.share if self.positions == "entropy" else 1.0
        return {"codec": self.codec.model_dump(mode="json"), "positions": self.positions, "share": share}

    def check_gives(self, needs: Needs) -> None:
        """Raises ValueError when objectives need what the store does not give; names the codecs that do."""
        if missing := needs.missing_from(self.codec.gives):
            able = [name for name, row in CODECS.items() if not needs.missing_from(row(name=name).gives)]
            raise ValueError(
                f"targets.codec: {self.codec.name} does not give what the objectives need: {missing}; "
                + (f"{' and '.join(able)} can" if able else "no codec does")
            )
