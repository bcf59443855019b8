"""What a form of a linear map is: values of a grid, the scales that they are multiplied with, and how both are stored.

Forms with their settings are rows of `kdscale.config.quantize.FORMS`; each names its implementation, a Form.

O outputs · I inputs of a linear map · G groups of inputs that share a scale
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from kdscale.config.quantize import FormConfig
from kdscale.weights import TensorInfo
from kdscale.weights.integer_grid import IntegerGrid


class Quantized(NamedTuple):
    """A linear map in few bits; `scales_OG` are in the dtype of the weight that it stands for."""

    codes_OI: Tensor  # int8, or a float of 8 bits
    scales_OG: Tensor

    def values(self) -> Tensor:
        """The weight [O, I] that readers of the format compute; float codes are multiplied like integers."""
        return IntegerGrid.values(self.codes_OI, self.scales_OG)


class Form(ABC):
    """How one form rounds a weight, and what it writes."""

    file_format: str  # by its name in compressed-tensors

    def __init__(self, settings: FormConfig):
        self.settings = settings

    @property
    def calibrated(self) -> bool:
        """Whether its weights are made by calibration; else each is rounded."""
        return self.settings.method == "gptq"

    @abstractmethod
    def round(self, weight_OI: Tensor) -> Quantized:
        """The weight with every value rounded to the nearest of its grid, on the device where it is."""

    @abstractmethod
    def scheme(self) -> dict[str, Any]:
        """The fields of a compressed-tensors QuantizationScheme."""

    @abstractmethod
    def tensors(self, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        """The tensors on disk that take the place of the weight `name`, with their shapes and dtypes."""

    @abstractmethod
    def encode(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        """These tensors, on the CPU."""


def make_form(settings: FormConfig) -> Form:
    """The implementation that the row of the form names."""
    module, _, name = settings.implementation.partition(":")
    form: Form = getattr(import_module(module), name)(settings)
    return form


def scale_name(name: str) -> str:
    """What the scales of the weight `name` are stored as."""
    return f"{name}_scale"
