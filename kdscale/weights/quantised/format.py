"""What every format of quantised checkpoints says about itself; each is a class in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from kdscale.errors import CheckpointError
from kdscale.weights.header import TensorEntry
from kdscale.weights.quantised.packed import PackedTensor, Part


class Format(ABC):
    """How one format stores its matrices; made from the settings in `quantization_config`.

    `dtype` is what the matrices are read as, by its safetensors name; `where` names the file in errors.
    """

    suffixes: ClassVar[Mapping[str, str]]  # part → what its name on disk ends with, after the stem
    needed: ClassVar[tuple[str, ...]]  # parts that every matrix has
    dimensions: ClassVar[Mapping[str, int]] = {}  # part → how many dimensions it has, where that is known

    def __init__(self, settings: Mapping[str, Any], where: str, dtype: str):
        self.settings, self.where, self.dtype = settings, where, dtype

    @property
    @abstractmethod
    def label(self) -> str:
        """The format and its settings, as a plan and a report name them."""

    @abstractmethod
    def stem(self, name: str, entries: Mapping[str, TensorEntry]) -> str | None:
        """What the names of a matrix's parts begin with, where `name` is the part that tells of it; else None."""

    def plain(self, stem: str) -> str:
        """The name of the plain matrix."""
        return f"{stem}.weight"

    @abstractmethod
    def packed(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        """The matrix `name` from its parts. Raises CheckpointError for shapes that do not fit together."""

    def find(self, name: str, stem: str, entries: Mapping[str, TensorEntry]) -> dict[str, Part]:
        """The parts of a matrix that are there. Raises CheckpointError where one that it needs is not."""
        found = {
            key: Part(stem + suffix, entries[stem + suffix])
            for key, suffix in self.suffixes.items()
            if stem + suffix in entries
        }
        if missing := [stem + self.suffixes[key] for key in self.needed if key not in found]:
            raise self.wrong(name, expected=f"its parts in {self.label}", got="no " + ", ".join(missing))
        for key, part in found.items():
            shape = part.entry.shape
            if 0 in shape or len(shape) != self.dimensions.get(key, len(shape)):
                expected = f"{part.name} with values, of {self.dimensions.get(key, 'some')} dimensions"
                raise self.wrong(name, expected=expected, got=f"shape {list(shape)}")
        return found

    def choice(self, field: str, known: tuple[Any, ...], absent: Any = None) -> Any:
        """A setting that has to be one of `known`. Raises CheckpointError."""
        value = self.settings.get(field, absent)
        if value not in known or isinstance(value, bool) != any(isinstance(one, bool) for one in known):
            raise CheckpointError(
                f"{self.where}: quantization_config.{field}",
                expected="one of " + ", ".join(map(repr, known)),
                got=repr(value)[:200],
                hint="use the checkpoint before it was quantised",
            )
        return value

    def wrong(self, name: str, *, expected: str, got: str) -> CheckpointError:
        """The error for a matrix whose parts do not fit together."""
        return CheckpointError(
            f"{self.where}: the quantised matrix {name}", expected=expected, got=got,
            hint="download the checkpoint again; quantization_config in config.json says how it should be stored",
        )  # fmt: skip

    def fits(self, name: str, parts: Mapping[str, Part], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError where a part has another shape."""
        for key, shape in shapes.items():
            if key in parts and parts[key].entry.shape != shape:
                got = str(list(parts[key].entry.shape))
                raise self.wrong(name, expected=f"{parts[key].name} of shape {list(shape)}", got=got)

    def dtypes(self, name: str, parts: Mapping[str, Part], dtypes: Mapping[str, tuple[str, ...]]) -> None:
        """Raises CheckpointError where a part has another dtype."""
        for key, known in dtypes.items():
            if key in parts and parts[key].entry.dtype not in known:
                got = parts[key].entry.dtype
                raise self.wrong(name, expected=f"{parts[key].name} in {' or '.join(known)}", got=got)
