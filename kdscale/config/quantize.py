"""`quantize`: in which forms with fewer bits the distilled student is written too."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from kdscale.config.calibration import CalibrationSection
from kdscale.config.correct import ShortTraining
from kdscale.config.fields import Count, Section, named_entry

Method = Literal["rtn", "gptq", "distilled"]
Group = Literal[32, 64, 128]
GROUPS: tuple[int, ...] = get_args(Group)


class FormConfig(Section):
    """One form: how many bits a weight of the layers' linear maps has, and what shares a scale.

    A new form is a subclass with its settings, a row of FORMS, and a file with its implementation.
    """

    implementation: ClassVar[str]  # "module:class", called with the settings

    name: str
    # rtn: each weight is rounded to the nearest value of its grid
    method: Method = "rtn"

    @property
    def label(self) -> str:
        """What the model is called in tables, and its folder under `quantized/`."""
        return f"{self.name}_{self.method}" if len(self.methods) > 1 else self.name

    @property
    def bits(self) -> int:
        """Bits of a weight, without its share of a scale."""
        raise NotImplementedError

    @property
    def group_size(self) -> int | None:
        """How many inputs of a linear map share a scale; None: all inputs of an output."""
        return None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that this form may be made with."""
        return ("rtn",)

    @property
    def needs_calibration(self) -> bool:
        """Whether text has to run through the model."""
        return self.method == "gptq"


class Int8Config(FormConfig):
    """8-bit integers with a scale for each output of a linear map."""

    implementation = "kdscale.quantize.integers:IntegerForm"

    name: Literal["int8"] = "int8"
    method: Literal["rtn"] = "rtn"

    @property
    def bits(self) -> int:
        return 8


class Int4Config(FormConfig, ShortTraining):
    """4-bit integers with a scale for each group of inputs of each output.

    The settings of a short training are for `distilled`: the student is trained on, by its own objectives, while its
    layers compute with the rounded weights.
    """

    implementation = "kdscale.quantize.integers:IntegerForm"

    name: Literal["int4"] = "int4"
    # gptq: what the rounding of one input loses, the inputs that are still to be rounded make up for
    method: Method = "gptq"
    group: Group = 32
    # distilled: the weights that the training begins with
    start: Literal["gptq", "rtn"] = "gptq"
    # distilled: at a fifth of the rate, ten steps move hardly a weight to another integer (measured-quantisation.md)
    lr_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    # gptq: the inputs with the largest values are rounded first
    act_order: bool = True
    # gptq: this share of the mean diagonal is added to the diagonal of the inputs' Gram matrix
    damping: Annotated[float, Field(gt=0.0, le=1e3)] = 0.01

    @property
    def label(self) -> str:
        return f"{super().label}_g{self.group}"

    @property
    def bits(self) -> int:
        return 4

    @property
    def group_size(self) -> int | None:
        return self.group

    @property
    def methods(self) -> tuple[str, ...]:
        return get_args(Method)

    @property
    def starts_from_gptq(self) -> bool:
        """Whether the form is trained, beginning with the weights that GPTQ makes."""
        return self.method == "distilled" and self.start == "gptq"

    @property
    def needs_calibration(self) -> bool:
        return super().needs_calibration or self.starts_from_gptq

    @model_validator(mode="after")
    def _training_is_on_its_grid(self) -> Int4Config:
        if given := sorted({"tokens", "fake_quantize"} & set(self.distill)):
            raise ValueError(f"distill.{given[0]}: the form itself says it: leave it out")
        if self.method != "distilled" and (self.distill or self.tokens is not None):
            raise ValueError(f"{'distill' if self.distill else 'tokens'}: for method: distilled, got {self.method}")
        return self


class Fp8Config(FormConfig):
    """8-bit floats (e4m3) with a scale for each output; what a linear map reads is rounded to them too, token by token.

    For GPUs that multiply such numbers.
    """

    implementation = "kdscale.quantize.float8:Float8Form"

    name: Literal["fp8"] = "fp8"
    method: Literal["rtn"] = "rtn"

    @property
    def bits(self) -> int:
        return 8


FORMS: dict[str, type[FormConfig]] = {"int8": Int8Config, "int4": Int4Config, "fp8": Fp8Config}

FormEntry = Annotated[
    SerializeAsAny[FormConfig], BeforeValidator(lambda entry: named_entry(entry, FORMS, FormConfig, "a form"))
]


class QuantizeConfig(CalibrationSection):
    """The forms, and the text that methods with calibration look at."""

    forms: tuple[FormEntry, ...] = Field(
        strict=False, min_length=1, max_length=16, default=(Int8Config(), Int4Config())
    )
    calibration_tokens: Count = 65_536

    @field_validator("forms")
    @classmethod
    def _every_form_once(cls, forms: tuple[FormConfig, ...]) -> tuple[FormConfig, ...]:
        labels = [form.label for form in forms]
        if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
            raise ValueError(f"expected every form once, got {', '.join(twice)} twice")
        return forms

    @property
    def trained(self) -> tuple[Int4Config, ...]:
        """The forms that the student is trained on for."""
        return tuple(form for form in self.forms if isinstance(form, Int4Config) and form.method == "distilled")

    @property
    def multiple(self) -> int:
        """What the widths that linear maps read must be a multiple of: the largest group, 1 without groups."""
        return max(form.group_size or 1 for form in self.forms)
